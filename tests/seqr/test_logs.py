"""Log lines: JSON or text, with fields, and never what an exception says."""

import json
import logging
import sys
from typing import Any

import pytest

from seqr.logs import JsonLines, TextLines


def record(message: str = "request", fields: dict[str, Any] | None = None, error: bool = False) -> logging.LogRecord:
    made = logging.LogRecord("gateway", logging.INFO, "", 0, message, None, sys.exc_info() if error else None)
    if fields is not None:
        made.fields = fields
    return made


def failed() -> logging.LogRecord:
    """What is logged of an exception that quotes a secret, as does its cause."""
    try:
        try:
            raise ValueError("a secret prompt")
        except ValueError as cause:
            raise RuntimeError("a secret prompt, again") from cause
    except RuntimeError:
        return record("failed", error=True)


def test_a_json_line_is_one_object_with_the_fields() -> None:
    line = JsonLines().format(record("two\nlines", {"status": 200, "user": 'a"b'}))
    assert "\n" not in line
    told = json.loads(line)
    assert (told["message"], told["status"], told["user"], told["level"]) == ("two\nlines", 200, 'a"b', "info")


def test_a_text_line_has_the_fields_behind_the_message() -> None:
    assert (
        TextLines()
        .format(record("request", {"status": 200, "ms": 1.5}))
        .endswith("INFO gateway request status=200 ms=1.5")
    )


@pytest.mark.parametrize("formatter", [JsonLines(), TextLines()])
def test_an_exception_is_told_by_kind_and_place_without_its_words(formatter: logging.Formatter) -> None:
    line = formatter.format(failed())
    assert "RuntimeError" in line and "ValueError" in line and "in failed" in line
    assert "secret" not in line


def test_debugging_shows_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQR_DEBUG", "1")
    assert "a secret prompt, again" in JsonLines().format(failed())
