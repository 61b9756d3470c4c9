"""Rows become prompts and answers; what is missing or broken in the data is named."""

from pathlib import Path
from typing import Any

import pytest

from seqr.bench.errors import BenchDataMissing, BenchDataUnreadable
from seqr.bench.paper.tasks import known_tasks, read_rows, sample
from seqr.bench.paper.workbench import Workbench


def test_every_task_of_the_paper_has_a_prompt_and_distinct_label_words() -> None:
    tasks = known_tasks()
    assert list(tasks) == [
        "ag_news", "cola", "dbpedia_14", "hellaswag", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2",
    ]  # fmt: skip
    for task in tasks.values():
        assert "{" in task.prompt
        assert len(set(task.labels)) == len(task.labels)
        assert bool(task.labels) != bool(task.endings)


def test_a_prompt_asks_what_the_file_says(bench: Workbench) -> None:
    example = known_tasks()["sst2"].example({"text": "a fine film", "label": 1}, bench.tokenizer, 120)
    assert example.text == "Review: a fine film\nSentiment:"
    assert bench.tokenizer.decode(example.candidates[example.gold]) == " positive"


def test_a_long_text_is_cut_and_the_question_stays(bench: Workbench) -> None:
    example = known_tasks()["sst2"].example({"text": "word " * 300, "label": 0}, bench.tokenizer, 90)
    assert len(example.prompt) + max(map(len, example.candidates)) <= 90
    assert example.text.endswith("\nSentiment:")


def test_a_long_story_loses_its_beginning_not_its_end(bench: Workbench) -> None:
    row = {"activity": "Cooking", "ctx": "start " + "word " * 100 + "the end", "endings": ["a", "b"], "label": 0}
    example = known_tasks()["hellaswag"].example(row, bench.tokenizer, 90)
    assert example.text.endswith("the end") and "start" not in example.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": 1}, "a row of sst2 has no usable field 'text'"),
        ({"text": "x", "label": 2}, "a row of sst2 has label 2; the task has 2 answers"),
        ({"text": "x", "label": "good"}, "a row of sst2 has no usable field"),
    ],
)
def test_a_row_that_cannot_be_asked_is_refused(bench: Workbench, row: dict[str, Any], message: str) -> None:
    with pytest.raises(BenchDataUnreadable, match=message):
        known_tasks()["sst2"].example(row, bench.tokenizer, 120)


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    (tmp_path / "sst2").mkdir()
    with pytest.raises(BenchDataMissing, match=r"sst2/test.jsonl is not there; --data names a folder with"):
        read_rows(tmp_path, "sst2", "test")


@pytest.mark.parametrize(
    ("text", "message"),
    [("{}\nnope\n", "line 2, is not JSON"), ("[]\n", "line 1, is not a JSON object"), ("", "has no rows")],
)
def test_a_broken_file_is_named_by_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2/train.jsonl").write_text(text)
    with pytest.raises(BenchDataUnreadable, match=message):
        read_rows(tmp_path, "sst2", "train")


def test_a_sample_is_the_same_for_a_seed_and_all_rows_where_there_are_few() -> None:
    rows = [{"text": str(i)} for i in range(50)]
    assert sample(rows, 10, 3) == sample(rows, 10, 3) != sample(rows, 10, 4)
    assert sorted(r["text"] for r in sample(rows, 100, 0)) == sorted(r["text"] for r in rows)
