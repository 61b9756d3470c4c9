"""Strict reading of signed documents: every field present, nothing extra, every value of its type and within limits."""

import math
import re
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Any

from seqr.canonical import is_sha256_hex
from seqr.errors import SeqrError

# Ids appear in file names, URLs and log lines and are compared byte by byte: no character that needs escaping anywhere.
_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)


def utc_now() -> datetime:
    """The current time, aware, to the second (what documents carry)."""
    return datetime.now(UTC).replace(microsecond=0)


def utc_text(moment: datetime) -> str:
    """The one textual form of a time in documents: ``2026-01-31T12:00:00Z``. ``moment`` must be aware."""
    if moment.tzinfo is None:
        raise ValueError("a time in a document needs a time zone")
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_utc(text: str) -> datetime:
    """Read what ``utc_text`` writes; raises ``ValueError`` for any other form."""
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)


def is_identifier(value: object) -> bool:
    """Whether ``value`` can be an id: 1 to 128 ASCII letters, digits and ``._-``, the first a letter or digit."""
    return isinstance(value, str) and _IDENTIFIER.fullmatch(value) is not None


class Fields:
    """One JSON object, read field by field; anything unexpected raises ``error`` with what was got and expected."""

    def __init__(self, value: Any, what: str, error: type[SeqrError], names: Collection[str]) -> None:
        self.what = what
        self._error = error
        if not isinstance(value, dict):
            raise error(f"{what} must be a JSON object, got {type(value).__name__}")
        missing, extra = sorted(set(names) - set(value)), sorted(set(value) - set(names))
        if missing or extra:
            got = "; ".join(
                f"{word} {', '.join(map(repr, some[:5]))}"
                for word, some in (("missing", missing), ("unknown", extra))
                if some
            )
            raise error(f"{what} does not have exactly the fields of its type: {got}")
        self._value: dict[str, Any] = value

    def refuse(self, name: str, expected: str) -> SeqrError:
        """The error for field ``name``, to be raised by a caller with a rule of its own."""
        got = repr(self._value[name])
        return self._error(f"{self.what}: {name} must be {expected}, got {got if len(got) <= 80 else got[:77] + '...'}")

    def raw(self, name: str) -> Any:
        """The value as parsed."""
        return self._value[name]

    def constant(self, name: str, expected: str) -> None:
        """Require one exact text, such as a document type."""
        if self._value[name] != expected:
            raise self.refuse(name, repr(expected))

    def text(self, name: str, longest: int = 1024) -> str:
        """Printable text of 1 to ``longest`` characters."""
        value = self._value[name]
        if not isinstance(value, str) or not 1 <= len(value) <= longest or not value.isprintable():
            raise self.refuse(name, f"printable text of 1 to {longest} characters")
        return value

    def identifier(self, name: str) -> str:
        """An id (see ``is_identifier``)."""
        value = self._value[name]
        if not isinstance(value, str) or not is_identifier(value):
            raise self.refuse(name, "an id of 1 to 128 letters, digits, '.', '_' or '-'")
        return value

    def choice(self, name: str, options: Collection[str]) -> str:
        """One of ``options``."""
        value = self._value[name]
        if not isinstance(value, str) or value not in options:
            raise self.refuse(name, "one of " + ", ".join(options))
        return value

    def integer(self, name: str, low: int, high: int) -> int:
        """A whole number in [low, high]; true and false are no numbers."""
        value = self._value[name]
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.refuse(name, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float) -> float:
        """A finite number in [low, high], as float."""
        value = self._value[name]
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.refuse(name, "a number")
        # Compared before conversion: an integer too large for a double must be refused, not overflow.
        if not low <= value <= high or not math.isfinite(value):
            raise self.refuse(name, f"a number from {low} to {high}")
        return float(value)

    def digest(self, name: str) -> str:
        """A SHA-256 as 64 lower-case hex digits."""
        value = self._value[name]
        if not isinstance(value, str) or not is_sha256_hex(value):
            raise self.refuse(name, "a SHA-256 of 64 lower-case hex digits")
        return value

    def prefixed_digest(self, name: str) -> str:
        """A SHA-256 written ``sha256:<hex>``."""
        value = self._value[name]
        if not isinstance(value, str) or not value.startswith("sha256:") or not is_sha256_hex(value[7:]):
            raise self.refuse(name, "'sha256:' and 64 lower-case hex digits")
        return value

    def time(self, name: str) -> str:
        """A time as ``utc_text`` writes it."""
        value = self._value[name]
        try:
            if isinstance(value, str) and utc_text(parse_utc(value)) == value:
                return value
        except ValueError:
            pass
        raise self.refuse(name, "a UTC time such as 2026-01-31T12:00:00Z")

    def items(self, name: str, most: int) -> list[Any]:
        """A list of at most ``most`` values."""
        value = self._value[name]
        if not isinstance(value, list) or len(value) > most:
            raise self.refuse(name, f"a list of at most {most} values")
        return value

    def digests(self, name: str, most: int) -> tuple[str, ...]:
        """A list of at most ``most`` SHA-256 hex digests."""
        value = self.items(name, most)
        if not all(is_sha256_hex(item) for item in value):
            raise self.refuse(name, "a list of SHA-256 hex digests")
        return tuple(value)

    def texts(self, name: str, most: int, longest: int = 512) -> tuple[str, ...]:
        """A list of 1 to ``most`` printable texts."""
        value = self.items(name, most)
        if not value or not all(isinstance(v, str) and 1 <= len(v) <= longest and v.isprintable() for v in value):
            raise self.refuse(name, f"a list of 1 to {most} texts of at most {longest} printable characters")
        return tuple(value)

    def digest_map(self, name: str, most: int) -> dict[str, str]:
        """An object of at most ``most`` names, each with a SHA-256 hex digest."""
        value = self._value[name]
        if not isinstance(value, dict) or len(value) > most or not all(is_sha256_hex(v) for v in value.values()):
            raise self.refuse(name, f"an object of at most {most} SHA-256 hex digests")
        return dict(value)

    def text_map(self, name: str, most: int = 64, longest: int = 512) -> dict[str, str]:
        """An object of at most ``most`` short printable texts."""
        value = self._value[name]
        fits = isinstance(value, dict) and len(value) <= most
        if not fits or not all(isinstance(v, str) and len(v) <= longest and v.isprintable() for v in value.values()):
            raise self.refuse(name, f"an object of at most {most} texts of at most {longest} printable characters")
        return dict(value)

    def number_map(self, name: str, most: int = 64) -> dict[str, float]:
        """An object of at most ``most`` finite numbers, as floats."""
        value = self._value[name]
        fits = isinstance(value, dict) and len(value) <= most
        if not fits or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in value.values()):
            raise self.refuse(name, f"an object of at most {most} numbers")
        if not all(abs(v) <= 1e300 for v in value.values()):
            raise self.refuse(name, "an object of finite numbers")
        return {key: float(v) for key, v in value.items()}

    def absent(self, name: str) -> bool:
        """Whether the field is null."""
        return self._value[name] is None
