"""Settings come from a file and the environment, in that order, and a refusal never repeats a secret."""

from pathlib import Path

import pytest
from pydantic import ValidationError
from pydantic_settings import SettingsConfigDict

from seqr.errors import SeqrError
from seqr.settings import FileSettings, NotText, is_loopback, is_safe_url, read_toml, toml_value, wrong_fields


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


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost",
        "http://localhost/",
        "HTTP://LOCALHOST:8443/x",
        "http://127.0.0.1:1",
        "http://[::1]",
        "http://[::1]:9",
    ],
)
def test_http_is_safe_within_this_machine_with_and_without_a_port(url: str) -> None:
    assert is_loopback(url) and is_safe_url(url)


def test_https_is_safe_anywhere() -> None:
    assert is_safe_url("https://coordinator.example:8443/v1") and not is_loopback("https://coordinator.example:8443/v1")
    assert is_loopback("https://localhost")


@pytest.mark.parametrize(
    "url",
    [
        "http://coordinator.example",
        "HTTP://coordinator.example",
        "http://localhost.example",
        "http://localhost@coordinator.example",
        "http://coordinator.example@localhost",
        "http://coordinator.example\\@localhost",
        "http://coordinator.example#@localhost",
        "http://127.0.0.1.example",
        "http://localhost:x",
        "http://[::1",
        " http://localhost",
        "http://local\thost",
        "http:///localhost",
        "ftp://localhost",
        "localhost:8443",
        "https://",
        "",
    ],
)
def test_other_http_and_what_parsers_read_differently_is_not_safe(url: str) -> None:
    assert not is_safe_url(url)


@pytest.mark.parametrize(("content", "problem"), [(b"\xff", "not UTF-8 text"), (b"a = = 1", "not valid TOML")])
def test_a_file_that_is_not_toml_is_refused_by_name(tmp_path: Path, content: bytes, problem: str) -> None:
    file = tmp_path / "x.toml"
    file.write_bytes(content)
    with pytest.raises(Refused, match=f"x.toml is {problem}"):
        read_toml(file, Refused)


@pytest.mark.parametrize(
    "value",
    [
        'say "no"',
        "C:\\folder\\new",
        "two\nlines\r\n",
        "".join(map(chr, [*range(32), 127, 128, 159])),
        "Zürich 🏥 \u2028",
        "' = #",
        "",
        True,
        False,
        -17,
    ],
)
def test_a_written_value_reads_back_as_the_same(tmp_path: Path, value: str | bool | int) -> None:
    file = tmp_path / "x.toml"
    file.write_bytes(f"value = {toml_value(value)}\nnext = 1\n".encode())
    assert read_toml(file, Refused) == {"value": value, "next": 1}


def test_a_value_that_is_no_text_is_refused() -> None:
    with pytest.raises(NotText, match=r"'caf\\udce9' is not UTF-8 text and cannot be a setting"):
        toml_value("caf\udce9")
