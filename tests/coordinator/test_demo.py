"""The demo's data is honest: asked in phrasings that no silo was trained on, and unreadable data is named."""

import io
import json
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from coordinator.demo.corpus import MAX_SILOS, CorpusUnreadable, load_corpus
from coordinator.demo.models import MAX_STEPS, choose_plan
from coordinator.demo.organisations import Question, load_organisations
from coordinator.demo.questions import Analyst, AnswerRefused, Reply, score
from coordinator.demo.story import Story
from coordinator.demo.world import CommandFailed, StepTimedOut, World

ORGANISATIONS = load_organisations()


@pytest.mark.parametrize("organisation", ORGANISATIONS, ids=lambda o: o.silo_id)
def test_every_fact_is_asked_in_a_phrasing_that_was_not_trained(organisation) -> None:
    trained = {record["prompt"] for record in organisation.records}
    assert len(organisation.questions) >= 20
    assert not trained & {question.text for question in organisation.questions}
    for question in organisation.questions:
        of_subject = [r for r in organisation.records if r["subject"] == question.subject]
        assert sum(question.is_answered_by(r["completion"]) for r in of_subject) >= 3
        assert question.answer not in question.text


def test_no_fact_can_be_had_from_another_organisation() -> None:
    for one in ORGANISATIONS:
        for other in ORGANISATIONS:
            if one is not other:
                said = " ".join(record["prompt"] + " " + record["completion"] for record in other.records)
                assert not [q.answer for q in one.questions if q.answer in said]


def test_an_answer_counts_whatever_its_case_and_spacing_and_not_when_it_says_something_else() -> None:
    question = Question("clinic", "Orla", "Which room?", "Larkspur 14")
    assert question.is_answered_by("The room is  larkspur\n14.")
    assert not question.is_answered_by("The room is Larkspur 1.")


def test_a_score_counts_right_answers_and_the_owners_mean_share() -> None:
    questions = [Question("clinic", "", "?", "yes"), Question("law", "", "?", "no")]
    replies = [Reply("yes", ("clinic",), {"clinic": 0.5}, "1"), Reply("yes", ("clinic",), {"clinic": 1.0}, "1")]
    result = score(questions, replies)
    assert (result.right, result.asked, result.percent, result.owner_share) == (1, 2, 50.0, 0.25)


def test_steps_follow_the_largest_silo_unless_they_are_given() -> None:
    assert choose_plan(ORGANISATIONS, tiny=False).max_steps <= MAX_STEPS
    assert choose_plan(ORGANISATIONS, tiny=False, steps=7).max_steps == 7
    assert choose_plan(ORGANISATIONS, tiny=True).rank == 4


class TestACorpus:
    def make(self, root: Path, name: str, train: str, test: str = '{"text": "t", "label_name": "l"}\n') -> Path:
        folder = root / name
        folder.mkdir()
        (folder / "train.jsonl").write_text(train)
        (folder / "test.jsonl").write_text(test)
        return root

    def test_each_folder_is_a_silo_that_learns_to_name_labels(self, tmp_path: Path) -> None:
        row = {"text": "I want a loan.", "text2": "Now.", "label_name": "ask_loan"}
        self.make(tmp_path, "Big Bank", json.dumps(row) + "\n", json.dumps(row) + "\n" + json.dumps(row) + "\n")
        (silo,) = load_corpus(tmp_path, questions=1)
        assert (silo.silo_id, silo.display_name, len(silo.questions)) == ("big-bank", "Big Bank", 1)
        assert silo.records[0]["completion"] == "ask loan"
        assert silo.records[0]["prompt"].endswith("Text: I want a loan.\nSecond text: Now.")

    @pytest.mark.parametrize(
        ("train", "problem"),
        [
            ("{", "train.jsonl:1: expected an object"),
            ('{"text": "t"}', "train.jsonl:1: expected an object with text and label_name"),
            ('{"text": "t", "label_name": "l"}\n[]', "train.jsonl:2: expected"),
            ("", "train.jsonl: the file has no rows"),
        ],
    )
    def test_a_bad_row_is_named_by_file_and_line(self, tmp_path: Path, train: str, problem: str) -> None:
        self.make(tmp_path, "one", train)
        with pytest.raises(CorpusUnreadable, match=problem):
            load_corpus(tmp_path, 5)

    def test_a_missing_split_is_named(self, tmp_path: Path) -> None:
        self.make(tmp_path, "one", '{"text": "t", "label_name": "l"}')
        (tmp_path / "one" / "test.jsonl").unlink()
        with pytest.raises(CorpusUnreadable, match=r"test\.jsonl: no such file"):
            load_corpus(tmp_path, 5)

    @pytest.mark.parametrize("there", [True, False])
    def test_a_folder_without_silos_is_refused(self, tmp_path: Path, there: bool) -> None:
        with pytest.raises(CorpusUnreadable, match="expected one folder per silo"):
            load_corpus(tmp_path if there else tmp_path / "nowhere", 5)

    def test_more_silos_than_one_machine_holds_are_refused(self, tmp_path: Path) -> None:
        for number in range(MAX_SILOS + 1):
            (tmp_path / f"s{number}").mkdir()
        with pytest.raises(CorpusUnreadable, match=f"got {MAX_SILOS + 1} silos"):
            load_corpus(tmp_path, 5)


def test_a_refused_question_shows_the_gateways_own_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    analyst = Analyst("http://127.0.0.1:9", "key", "model")
    refusal = httpx.Response(401, json={"error": {"message": "This key has expired."}})
    monkeypatch.setattr(httpx.Client, "post", lambda *_args, **_more: refusal)
    with pytest.raises(AnswerRefused, match=r"answered 401: This key has expired\."):
        analyst.ask("Who?")


def test_a_command_that_fails_is_named_with_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match=r"'seqr silo check --dir .*' ended with status 1: .*silo\.toml"):
        World(tmp_path).seqr("silo", "check", "--dir", str(tmp_path))


def test_waiting_ends_with_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(StepTimedOut, match="the moon did not happen in 0 s"):
        World(tmp_path).wait("the moon", lambda: False, 0.0)


def test_a_tables_title_is_one_line_above_a_narrow_table() -> None:
    out = io.StringIO()
    Story(Console(file=out, width=110)).table("What happened to the request", ("a", "b"), [("x", "1")])
    assert out.getvalue().splitlines()[0] == "What happened to the request"


def test_what_is_to_be_copied_is_never_broken_into_lines() -> None:
    out = io.StringIO()
    command = "curl http://127.0.0.1:8080/v1 -H 'Authorization: Bearer " + "k" * 200 + "' [bold]"
    Story(Console(file=out, width=60)).verbatim(command)
    assert out.getvalue() == command + "\n"
