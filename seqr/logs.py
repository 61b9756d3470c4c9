"""How services write their log: one line per event, as JSON or for people.

What an exception says may quote a record or a prompt, so a traceback shows where it happened and of what kind it is,
and no more. ``SEQR_DEBUG=1`` shows all.
"""

import json
import logging
import os
import sys
import traceback
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal

DEBUG = "SEQR_DEBUG"


def describe(error: tuple[type[BaseException], BaseException, TracebackType | None]) -> str:
    """The kinds of an exception and its causes, and where each was raised; without their messages."""
    if os.environ.get(DEBUG):
        return "".join(traceback.format_exception(*error)).rstrip()
    lines: list[str] = []
    cause: BaseException | None = error[1]
    while cause is not None and len(lines) < 200:
        frames = traceback.extract_tb(cause.__traceback__)
        lines.append(type(cause).__name__)
        lines += [f"  {frame.filename}:{frame.lineno} in {frame.name}" for frame in frames]
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return "\n".join(lines)


class JsonLines(logging.Formatter):
    """Time, level, logger, message, and the fields given as ``extra={"fields": {...}}``."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = describe(record.exc_info)
        return json.dumps(line, default=str)


class TextLines(logging.Formatter):
    """The same for people, fields as ``name=value``."""

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={value}" for name, value in getattr(record, "fields", {}).items())
        line = f"{self.formatTime(record)} {record.levelname} {record.name} {record.getMessage()}{fields}"
        if record.exc_info and record.exc_info[0] is not None:
            line += "\n" + describe(record.exc_info)
        return line


def configure(style: Literal["text", "json"], level: str = "INFO") -> None:
    """Send everything to standard error, warnings too; uvicorn's own access log, which prints URLs, stays off."""
    logging.captureWarnings(True)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if style == "json" else TextLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("uvicorn.access").disabled = True
    for noisy in ("httpx", "httpcore", "alembic", "sqlalchemy.engine"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def adopt(*names: str) -> None:
    """Let libraries that write to standard error by themselves log like everything else. Call after importing them."""
    for name in names:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
