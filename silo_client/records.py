"""A record: what one row means, who it is about, its digest, and its place in the order of training.

The order is a function of the plan and the record's key alone, so it does not know the order of the file, and taking a
record away leaves the order of all others as it was. Deletion rests on this.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from seqr.canonical import canonical_json, sha256_hex
from seqr.job import record_commitment
from seqr.merkle import merkle_root
from silo_client.config import DataSource, SiloConfig
from silo_client.data import Row, read_rows, unknown_column
from silo_client.errors import (
    DataError,
    EncodingInvalid,
    FieldEmpty,
    FieldNotText,
    FileEmpty,
    KeyDuplicate,
    SubjectErased,
)


@dataclass(frozen=True)
class Record:
    """One training example. ``key`` is unique in a silo; ``digest`` (64 hex) covers all that the row says."""

    key: str
    digest: str
    subject: str | None
    prompt: str = field(repr=False)
    completion: str = field(repr=False)
    where: str = field(compare=False)

    def commitment(self, salt: bytes) -> str:
        """HMAC-SHA256 of the digest under the silo's salt: says nothing about the record to who lacks the salt."""
        return record_commitment(salt, bytes.fromhex(self.digest))


@dataclass(frozen=True)
class Collection:
    """The silo's usable records, the rows that are not, and how many rows only repeated another."""

    records: tuple[Record, ...]
    problems: tuple[DataError, ...]
    repeated: int


def commitments(records: Iterable[Record], salt: bytes) -> list[str]:
    """The salted commitments (64 hex each) of ``records``."""
    return [record.commitment(salt) for record in records]


def dataset_root(commitments: Iterable[str]) -> str:
    """Merkle root (64 hex) over ``commitments``, sorted, so that it does not know the order of the files either."""
    return merkle_root([bytes.fromhex(commitment) for commitment in sorted(set(commitments))])


def training_order(records: Iterable[Record], plan_id: str, epoch: int = 0) -> list[Record]:
    """``records`` in the order of epoch ``epoch`` under ``plan_id``: by SHA-256 of plan, epoch and key."""

    def place(record: Record) -> tuple[str, str]:
        return sha256_hex(canonical_json(["order", plan_id, epoch, record.key])), record.key

    return sorted(records, key=place)


def collect(
    config: SiloConfig, *, is_erased: Callable[[str], bool], may_be_empty: Callable[[str], bool] = lambda path: False
) -> Collection:
    """Read all data files of the silo.

    Args:
        is_erased: whether a subject's records were erased, so that its rows must not come back.
        may_be_empty: whether a data file (as named in silo.toml) is empty because an erasure emptied it.
    """
    records: dict[str, Record] = {}
    by_key: dict[str, list[Record]] = defaultdict(list)
    problems: list[DataError] = []
    repeated = 0
    for source in config.data:
        rows = 0
        try:
            for row in read_rows(config.resolve(source.path), source):
                rows += row.fields is not None or row.error is not None
                if row.error is not None:
                    problems.append(row.error)
                if row.fields is None:
                    continue
                try:
                    record = to_record(row, source)
                except DataError as error:
                    problems.append(error)
                    continue
                if record.subject is not None and is_erased(record.subject):
                    problems.append(_erased(record.where))
                elif source.key_column is not None:
                    by_key[record.key].append(record)
                elif record.key in records:
                    repeated += 1
                else:
                    records[record.key] = record
        except DataError as error:
            problems.append(error)
        else:
            if not rows and not may_be_empty(str(source.path)):
                problems.append(
                    FileEmpty(str(source.path), "the data file is empty; fill it, or take it out of silo.toml")
                )
    for key, same in by_key.items():
        if len(same) > 1:
            # All of them are refused: keeping the first would make the adapter depend on the order of the file.
            problems += [_duplicate(record.where, same[0].where) for record in same[1:]]
        else:
            records[key] = same[0]
    return Collection(tuple(records.values()), tuple(problems), repeated)


def to_record(row: Row, source: DataSource) -> Record:
    """The record of a readable row.

    Raises:
        ColumnUnknown, FieldNotText, FieldEmpty, EncodingInvalid: naming the row's file and line.
    """
    prompt = _text(row, source.prompt_column)
    completion = _text(row, source.completion_column)
    for name, value in ((source.prompt_column, prompt), (source.completion_column, completion)):
        if not value.strip():
            raise FieldEmpty(row.where, f"the column '{name}' is empty")
    subject = subject_of(row, source)
    content = {"prompt": prompt, "completion": completion, "subject": subject}
    if source.key_column is None:
        key = None
    else:
        key = _identifier(row, source.key_column)
        if key is None:
            raise FieldEmpty(row.where, f"the key column '{source.key_column}' is empty")
    digest = sha256_hex(canonical_json({"type": "seqr/record/v1", "key": key, **content}))
    return Record(
        key=f"digest:{digest}" if key is None else f"key:{key}",
        digest=digest,
        subject=subject,
        prompt=prompt,
        completion=completion,
        where=row.where,
    )


def subject_of(row: Row, source: DataSource) -> str | None:
    """Whose record a readable row is; None where the row or the file names nobody."""
    return None if source.subject_column is None else _identifier(row, source.subject_column)


def _text(row: Row, column: str) -> str:
    value = _value(row, column)
    if not isinstance(value, str):
        raise FieldNotText(row.where, f"the column '{column}' holds {_kind(value)}, not text")
    return _encodable(row, column, value)


def _identifier(row: Row, column: str) -> str | None:
    value = _value(row, column)
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise FieldNotText(row.where, f"the column '{column}' holds {_kind(value)}, not text or a whole number")
    return _encodable(row, column, str(value))


def _value(row: Row, column: str) -> Any:
    fields = row.fields or {}
    if column not in fields:
        raise unknown_column(row.where, column, sorted(fields))
    return fields[column]


def _encodable(row: Row, column: str, value: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise EncodingInvalid(row.where, f"the column '{column}' holds half a surrogate pair, which is not a character")
    return value


def _kind(value: Any) -> str:
    kinds = {type(None): "null", bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return kinds.get(type(value), "an object")


def _erased(where: str) -> SubjectErased:
    return SubjectErased(
        where, "this row is about a subject whose records were erased; remove it ('seqr silo forget' does)"
    )


def _duplicate(where: str, first: str) -> KeyDuplicate:
    return KeyDuplicate(where, f"this row has the same key as {first}; every record needs a key of its own")
