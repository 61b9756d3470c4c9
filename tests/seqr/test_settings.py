"""Settings come from a file and the environment, in that order, and a refusal never repeats a secret."""

from pathlib import Path

import pytest
from pydantic import ValidationError
from pydantic_settings import SettingsConfigDict

from seqr.errors import SeqrError
from seqr.settings import FileSettings, read_toml, wrong_fields


class Refused(SeqrError):
    code = "refused"


class Example(FileSettings):
    model_config = SettingsConfigDict(env_prefix="SEQR_EXAMPLE_", extra="forbid")

    port: int = 1
    url: str = ""


def test_the_environment_wins_over_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Example(port=2).port == 2
    monkeypatch.setenv("SEQR_EXAMPLE_PORT", "3")
    assert Example(port=2).port == 3


def test_no_env_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("SEQR_EXAMPLE_PORT=9\n")
    monkeypatch.chdir(tmp_path)
    assert Example().port == 1


def test_wrong_fields_are_named_without_their_values() -> None:
    with pytest.raises(ValidationError) as caught:
        Example(port="hunter2", unknown="hunter2")
    said = wrong_fields(caught.value)
    assert "port" in said and "unknown" in said and "hunter2" not in said


@pytest.mark.parametrize(("content", "problem"), [(b"\xff", "not UTF-8 text"), (b"a = = 1", "not valid TOML")])
def test_a_file_that_is_not_toml_is_refused_by_name(tmp_path: Path, content: bytes, problem: str) -> None:
    file = tmp_path / "x.toml"
    file.write_bytes(content)
    with pytest.raises(Refused, match=f"x.toml is {problem}"):
        read_toml(file, Refused)
