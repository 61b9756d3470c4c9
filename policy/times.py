"""Instants: timezone-aware outside, whole microseconds since 1970 UTC in the database.

An integer compares alike in SQLite and PostgreSQL and has no time zone to get wrong.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final, Literal

from policy.errors import TimeInvalid, TimeWithoutZone

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND: Final = timedelta(microseconds=1)
DEFAULT_LIFETIME: Final = timedelta(days=90)
Never = Literal["never"]


def utc_now() -> datetime:
    return datetime.now(UTC)


def to_micros(value: datetime, field: str = "time") -> int:
    """Microseconds since 1970 UTC. Raises TimeWithoutZone for a naive datetime."""
    if not isinstance(value, datetime):
        raise TimeInvalid(field, value, "a datetime with a time zone")
    if value.utcoffset() is None:
        raise TimeWithoutZone(field, value)
    return (value - EPOCH) // MICROSECOND


def from_micros(value: int) -> datetime:
    return EPOCH + timedelta(microseconds=value)


def iso(value: int | None) -> str | None:
    """RFC 3339 in UTC with fixed width, so that texts sort as the instants do."""
    return None if value is None else from_micros(value).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def parse_time(field: str, value: object) -> datetime:
    """A datetime, or its ISO 8601 text, with a time zone. Raises TimeInvalid, TimeWithoutZone."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise TimeInvalid(field, value, "a time like 2026-12-31T12:00:00Z") from None
    if not isinstance(value, datetime):
        raise TimeInvalid(field, value, "a time like 2026-12-31T12:00:00Z")
    to_micros(value, field)
    return value
