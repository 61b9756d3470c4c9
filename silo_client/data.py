"""Rows of the owner's files, one at a time, with the line each stands on.

Reading never changes a file and never stops at a bad row: a bad row is yielded with its error, and the caller decides.
The raw bytes of every row are kept, so that an erasure can write the other rows back unchanged.
"""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from silo_client.config import DataSource
from silo_client.errors import (
    ColumnUnknown,
    CsvBroken,
    DataError,
    DataFileMissing,
    EncodingInvalid,
    JsonBroken,
)

BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Row:
    """One row as it stands in a file.

    ``raw`` is its bytes with the line ending; ``line`` the number (from 1) of its first line. ``fields`` is None for a
    blank line, a CSV header and a row that cannot be read; ``error`` says what is wrong with the latter.
    """

    where: str
    line: int
    raw: bytes
    fields: Mapping[str, Any] | None = None
    error: DataError | None = None


def read_rows(path: Path, source: DataSource) -> Iterator[Row]:
    """Yield every row of ``path`` in file order.

    Raises:
        DataFileMissing: the file cannot be opened.
        EncodingInvalid, CsvBroken, ColumnUnknown: the header of a CSV file cannot be used.
    """
    label = str(source.path)
    try:
        path.open("rb").close()
    except OSError as error:
        raise DataFileMissing(label, f"the data file cannot be read: {error.strerror}; see data in silo.toml") from None
    return _jsonl_rows(path, label) if source.format == "jsonl" else _csv_rows(path, label, source)


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file


def _jsonl_rows(path: Path, label: str) -> Iterator[Row]:
    for number, raw in enumerate(_lines(path), start=1):
        where = f"{label}:{number}"
        text = raw.removeprefix(BOM) if number == 1 else raw
        if not text.strip():
            yield Row(where, number, raw)
            continue
        try:
            fields = json.loads(text.decode())
        except UnicodeDecodeError as error:
            yield Row(where, number, raw, error=_not_utf8(where, error.start))
        except json.JSONDecodeError as error:
            broken = JsonBroken(
                where, f"this line is not JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
            )
            yield Row(where, number, raw, error=broken)
        except (RecursionError, ValueError):
            yield Row(
                where, number, raw, error=JsonBroken(where, "this line nests too deep or holds too long a number")
            )
        else:
            if isinstance(fields, dict):
                yield Row(where, number, raw, fields)
            else:
                broken = JsonBroken(
                    where, 'this line is JSON but not an object such as {"prompt": ..., "completion": ...}'
                )
                yield Row(where, number, raw, error=broken)


class _CountedLines:
    """Decoded lines for ``csv.reader``, remembering the bytes of those it took for the row in hand."""

    def __init__(self, path: Path) -> None:
        self._lines = _lines(path)
        self.taken: list[bytes] = []
        self.count = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        raw = next(self._lines)
        self.taken.append(raw)
        self.count += 1
        # Bytes that are not UTF-8 become lone surrogates here and are reported with their row.
        return (raw.removeprefix(BOM) if self.count == 1 else raw).decode(errors="surrogateescape")

    def take(self) -> bytes:
        raw, self.taken = b"".join(self.taken), []
        return raw


def _csv_rows(path: Path, label: str, source: DataSource) -> Iterator[Row]:
    lines = _CountedLines(path)
    reader = csv.reader(lines, strict=True)
    header: list[str] | None = None
    while True:
        line = lines.count + 1
        where = f"{label}:{line}"
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            broken = CsvBroken(where, f"the row that begins here is not CSV: {error}")
            if header is None:
                raise broken from None
            yield Row(where, line, lines.take(), error=broken)
            continue
        raw = lines.take()
        if not values:
            yield Row(where, line, raw)
        elif any(_escaped_bytes(value) for value in values):
            if header is None:
                raise _not_utf8(where, _first_bad_byte(raw))
            yield Row(where, line, raw, error=_not_utf8(where, _first_bad_byte(raw)))
        elif header is None:
            header = _checked_header(where, values, source)
            yield Row(where, line, raw)
        elif len(values) != len(header):
            wrong = CsvBroken(where, f"this row has {len(values)} columns where the header names {len(header)}")
            yield Row(where, line, raw, error=wrong)
        else:
            yield Row(where, line, raw, dict(zip(header, values, strict=True)))


def _checked_header(where: str, names: list[str], source: DataSource) -> list[str]:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise CsvBroken(where, f"the header names the column '{twice}' twice")
    for name in (source.prompt_column, source.completion_column, source.subject_column, source.key_column):
        if name is not None and name not in names:
            raise unknown_column(where, name, names)
    return names


def unknown_column(where: str, name: str, names: list[str]) -> ColumnUnknown:
    known = ", ".join(names)
    return ColumnUnknown(where, f"there is no column '{name}' (columns here: {known}); name the right one in silo.toml")


def _not_utf8(where: str, offset: int) -> EncodingInvalid:
    return EncodingInvalid(where, f"byte {offset + 1} of this line is not UTF-8; save the file as UTF-8")


def _escaped_bytes(value: str) -> bool:
    return any("\udc80" <= character <= "\udcff" for character in value)


def _first_bad_byte(raw: bytes) -> int:
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return error.start
    return 0
