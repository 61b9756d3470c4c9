"""Ids and texts as they are accepted. Ids compare byte by byte: no case folding, no Unicode normalisation."""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

from policy.errors import ActorMissing, IdInvalid, ReasonMissing, SubjectMalformed, TextInvalid

MAX_ID: Final = 200
MAX_TEXT: Final = 2000


class Subject(NamedTuple):
    """Who a grant or a membership is about: a user or a group."""

    kind: Literal["user", "group"]
    id: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.id}"


def is_valid_id(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_ID and value.isprintable() and " " not in value


def check_id(kind: str, value: str) -> str:
    if not is_valid_id(value):
        raise IdInvalid(kind, value)
    return value


def parse_subject(value: str) -> Subject:
    kind, colon, name = value.partition(":") if isinstance(value, str) else ("", "", "")
    if not colon or not is_valid_id(name):
        raise SubjectMalformed(value)
    if kind == "user":
        return Subject("user", name)
    if kind == "group":
        return Subject("group", name)
    raise SubjectMalformed(value)


def check_text(field: str, value: str) -> str:
    """Free text: no control characters but tab and newline, no lone surrogates (PostgreSQL stores neither)."""
    if not isinstance(value, str):
        raise TextInvalid(field, "is not text")
    if len(value) > MAX_TEXT:
        raise TextInvalid(field, f"has {len(value)} characters and at most {MAX_TEXT} are kept")
    if any((ord(c) < 32 and c not in "\t\n") or ord(c) == 127 or 0xD800 <= ord(c) <= 0xDFFF for c in value):
        raise TextInvalid(field, "holds control characters")
    return value


def check_actor(value: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ActorMissing
    return check_text("actor", value)


def check_reason(value: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ReasonMissing
    return check_text("reason", value)
