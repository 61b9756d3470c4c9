"""``seqr silo`` as its owner meets it: friendly sentences, a code for every error, never a traceback."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from seqr.cli import main
from seqr.keys import SigningKey
from seqr.plan import sign_plan
from silo_client.jobs import handle_job

from .conftest import Federation, Silo, rows


@pytest.fixture
def seqr(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(*args: object) -> tuple[int, str]:
        capfd.readouterr()
        try:
            main(["silo", *map(str, args)])
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        printed = capfd.readouterr()
        assert "Traceback" not in printed.err
        return status, printed.out + printed.err

    return run


Seqr = Callable[..., tuple[int, str]]


def init_args(directory: Path, federation: Federation, data: Path) -> list[object]:
    key = federation.coordinator.public.to_b64()
    return ["init", directory, "--silo-id", "silo-a", "--coordinator-key", key, "--base-model", federation.model,
            "--data", data, "--threads", "1"]  # fmt: skip


def test_from_init_to_a_trained_adapter(seqr: Seqr, federation: Federation, tmp_path: Path) -> None:
    data = tmp_path / "facts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    (tmp_path / "plan.json").write_bytes(federation.plan_env)
    home = tmp_path / "home"
    status, said = seqr(*init_args(home, federation, data))
    assert status == 0
    assert "fingerprint: SHA256:" in said
    status, said = seqr("check", "--dir", home, "--plan", tmp_path / "plan.json")
    assert status == 0, said
    assert "9 records of" in said
    assert seqr("train", "--dir", home)[1].startswith("error[plan_missing]: ")
    status, said = seqr("train", "--dir", home, "--plan", tmp_path / "plan.json")
    assert status == 0, said
    assert "step 6 of 6, loss " in said
    assert "nothing was sent" in said
    assert "taken from the cache" in seqr("train", "--dir", home)[1]
    status, said = seqr("status", "--dir", home)
    assert "trained on 9 records" in said
    assert "it has not been sent" in said
    status, said = seqr("forget", "--dir", home, "--subject", "ann", "--yes")
    assert status == 0
    assert "3 records are gone" in said
    assert len(data.read_text().splitlines()) == 6
    assert "1 subject was erased here" in seqr("status", "--dir", home)[1]


def test_init_does_not_touch_a_silo_that_exists(seqr: Seqr, federation: Federation, silo: Silo) -> None:
    before = silo.everything()
    status, said = seqr(*init_args(silo.directory, federation, silo.data))
    assert status == 1
    assert said.startswith("error[already_initialised]: ")
    assert silo.everything() == before


def test_init_with_a_key_that_is_none_leaves_nothing_behind(seqr: Seqr, federation: Federation, tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text("{}\n")
    args = ["nonsense" if arg == federation.coordinator.public.to_b64() else arg
            for arg in init_args(tmp_path / "s", federation, data)]  # fmt: skip
    status, said = seqr(*args)
    assert status == 1
    assert said.startswith("error[key_invalid]: ")
    assert not (tmp_path / "s" / "silo.toml").exists()


def test_init_asks_no_hub_for_a_base_model_that_is_not_there(
    seqr: Seqr, federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text("{}\n")
    asked: list[str] = []
    monkeypatch.setattr("seqr.models.prepare_base_model", lambda source, _to: asked.append(source))

    def args(model: str) -> list[object]:
        given = init_args(tmp_path / "s", federation, data)
        return [model if arg == federation.model else arg for arg in given]

    status, said = seqr(*args("models/base"))
    assert (status, said.strip()) == (
        1,
        "error[base_model_missing]: there is no base model at models/base; give a model directory, a .gguf file, or "
        "hub:OWNER/NAME to fetch one from the model hub",
    )
    assert not (tmp_path / "s").exists() and asked == []
    seqr(*args("hub:models/base"))
    assert asked == ["models/base"]


def test_init_with_a_missing_data_file_names_it(seqr: Seqr, federation: Federation, tmp_path: Path) -> None:
    status, said = seqr(*init_args(tmp_path / "s", federation, tmp_path / "none.jsonl"))
    assert (status, said.partition(":")[0]) == (1, "error[data_file_missing]")


def test_check_lists_every_problem_with_its_line_and_code(seqr: Seqr, silo: Silo) -> None:
    silo.data.write_text('{"broken\n{"key": "a", "prompt": "x"}\n')
    status, said = seqr("check", "--dir", silo.directory)
    assert status == 1
    assert "records.jsonl:1: " in said
    assert "[json_broken]" in said
    assert "records.jsonl:2: " in said
    assert "[column_unknown]" in said
    assert "3 problems to solve" in said


def test_check_says_that_the_base_model_is_not_the_plans(
    seqr: Seqr, silo: Silo, federation: Federation, tmp_path: Path
) -> None:
    (tmp_path / "plan.json").write_bytes(federation.plan_env)
    settings = silo.directory / "silo.toml"
    settings.write_text(settings.read_text().replace(str(federation.model), str(tmp_path / "nowhere")))
    status, said = seqr("check", "--dir", silo.directory, "--plan", tmp_path / "plan.json")
    assert status == 1
    assert "[base_model_missing]" in said


@pytest.mark.parametrize("command", ["check", "train"])
def test_a_plan_signed_by_another_key_is_refused(
    seqr: Seqr, silo: Silo, federation: Federation, tmp_path: Path, command: str
) -> None:
    (tmp_path / "plan.json").write_bytes(sign_plan(federation.plan, SigningKey.generate()).to_json())
    before = silo.everything()
    status, said = seqr(command, "--dir", silo.directory, "--plan", tmp_path / "plan.json")
    assert status == 1
    assert said.startswith("error[plan_signature_invalid]: ")
    after = silo.everything()
    after.pop("state/lock", None)
    assert after == before


def test_a_plan_file_that_is_none_is_named(seqr: Seqr, silo: Silo, tmp_path: Path) -> None:
    assert seqr("train", "--dir", silo.directory, "--plan", tmp_path / "x")[1].startswith("error[plan_missing]: ")
    (tmp_path / "x").write_text("{")
    assert seqr("train", "--dir", silo.directory, "--plan", tmp_path / "x")[1].startswith("error[envelope_malformed]: ")


def test_two_trainings_at_once_are_refused(seqr: Seqr, silo: Silo) -> None:
    with silo.state.lock():
        assert seqr("train", "--dir", silo.directory)[1].startswith("error[silo_busy]: ")


def test_a_state_directory_without_its_key_says_what_to_do(
    seqr: Seqr, silo: Silo, federation: Federation, tmp_path: Path
) -> None:
    lost = silo.state.signing_key().public.fingerprint
    silo.state.signing_key_path.unlink()
    said = seqr("status", "--dir", silo.directory)[1]
    assert said.startswith("error[state_damaged]: ")
    assert "run 'seqr silo init' in a new directory and enrol" in said
    status, said = seqr(*init_args(tmp_path / "anew", federation, silo.data))
    assert status == 0 and "fingerprint: SHA256:" in said and lost not in said


def test_status_tells_why_the_last_order_was_refused(seqr: Seqr, silo: Silo, federation: Federation) -> None:
    silo.data.write_text("broken\n")
    handle_job(federation.signed(federation.order()), federation.plan_env, silo.config)
    said = seqr("status", "--dir", silo.directory)[1]
    assert "last refused order, " in said
    assert "records.jsonl:1: this line is not JSON" in said


def test_forgetting_an_unknown_subject_changes_nothing(seqr: Seqr, silo: Silo) -> None:
    status, said = seqr("forget", "--dir", silo.directory, "--subject", "zoe", "--yes")
    assert (status, said.partition(":")[0]) == (1, "error[subject_unknown]")
    assert silo.rows() == rows()


def test_a_folder_that_is_no_silo_says_what_to_run(seqr: Seqr, tmp_path: Path) -> None:
    assert seqr("status", "--dir", tmp_path)[1].startswith("error[config_missing]: ")


@pytest.mark.parametrize("content", [b"", '{"prompt": "caf\u00e9"}\n'.encode("latin-1")])
def test_an_unreadable_first_row_does_not_decide_that_nobody_can_be_erased(
    seqr: Seqr, federation: Federation, tmp_path: Path, content: bytes
) -> None:
    data, home = tmp_path / "facts.jsonl", tmp_path / "home"
    data.write_bytes(content)
    assert seqr(*init_args(home, federation, data))[0] == 0
    assert 'subject_column = "subject"' in (home / "silo.toml").read_text()


def test_data_without_a_subject_column_is_noted_and_never_taken_for_an_unknown_person(
    seqr: Seqr, federation: Federation, tmp_path: Path
) -> None:
    data, home = tmp_path / "facts.jsonl", tmp_path / "home"
    data.write_text('{"prompt": "Who?", "completion": "Orla Wexcombe."}\n')
    assert "no column says whose record a row is" in seqr(*init_args(home, federation, data))[1]
    status, said = seqr("check", "--dir", home)
    assert status == 0
    assert "note    no column says whose record a row is, so nobody's records can be erased: name it as" in said
    status, said = seqr("forget", "--dir", home, "--subject", "Orla Wexcombe", "--yes")
    assert status == 1
    assert said.startswith("error[subject_column_missing]: no column says whose record a row is")
