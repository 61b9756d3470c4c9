"""The audit log: rows chained by SHA-256. Each row's hash covers all its columns and the hash before it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, insert, select, true, update

from policy.errors import AuditBroken, HeadMalformed, TextInvalid
from policy.models import AuditRow, PolicyState
from policy.times import iso

GENESIS: Final = "0" * 64


@dataclass(frozen=True)
class Head:
    """The last row's number and hash. Kept elsewhere, it is what makes truncation visible."""

    seq: int
    hash: str


@dataclass(frozen=True)
class AuditEntry:
    seq: int
    at: str
    actor: str
    action: str
    detail: dict[str, Any]
    reason: str
    policy_version: int
    prev_hash: str
    hash: str


@dataclass(frozen=True)
class AuditReport:
    """What `verify` found. `first_bad` is the number of the first row that does not fit; None when all do."""

    ok: bool
    rows: int
    head: Head
    first_bad: int | None
    problem: str | None
    compared_with_shipped_head: bool

    def require_ok(self) -> None:
        if not self.ok:
            raise AuditBroken(self.first_bad, self.problem or "unknown")


def canonical(value: Mapping[str, Any]) -> str:
    """JSON with sorted keys and no spaces, in ASCII. Raises TextInvalid for what JSON cannot say."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError):
        raise TextInvalid("audit detail", "is not JSON") from None


def row_hash(row: Mapping[str, Any]) -> str:
    """SHA-256 over the canonical JSON of every column but the hash itself; `detail` enters as its stored text."""
    covered = {name: row[name] for name in _COVERED}
    return hashlib.sha256(canonical(covered).encode("ascii")).hexdigest()


_COVERED = ("seq", "at", "actor", "action", "detail", "reason", "policy_version", "prev_hash")


def parse_head(text: str) -> Head | str:
    """SEQ:HASH, as `seqr policy audit head` prints it, or a hash alone, as in a receipt. Raises HeadMalformed."""
    match = re.fullmatch(r"(?:([0-9]{1,18}):)?([0-9a-f]{64})", text.strip())
    if match is None:
        raise HeadMalformed(text)
    return match[2] if match[1] is None else Head(int(match[1]), match[2])


def append(
    connection: Connection,
    last: Head,
    *,
    at: int,
    actor: str,
    action: str,
    detail: Mapping[str, Any],
    reason: str,
    version: int,
) -> Head:
    """Adds one row after `last` inside the caller's transaction, which holds the lock on policy_state."""
    row: dict[str, Any] = {
        "seq": last.seq + 1,
        "at": at,
        "actor": actor,
        "action": action,
        "detail": canonical(detail),
        "reason": reason,
        "policy_version": version,
        "prev_hash": last.hash,
    }
    row["hash"] = row_hash(row)
    connection.execute(insert(AuditRow).values(row))
    connection.execute(update(PolicyState).values(audit_seq=row["seq"], audit_hash=row["hash"], version=version))
    return Head(row["seq"], row["hash"])


def head(connection: Connection) -> Head:
    state = connection.execute(select(PolicyState.audit_seq, PolicyState.audit_hash)).one()
    return Head(state.audit_seq, state.audit_hash)


def entries(connection: Connection, after: int = 0, limit: int | None = None) -> Iterator[AuditEntry]:
    """Rows with seq > after, oldest first."""
    rows = select(AuditRow.__table__).where(AuditRow.seq > after).order_by(AuditRow.seq).limit(limit)
    for row in connection.execute(rows).mappings():
        yield AuditEntry(**{**row, "at": iso(row["at"]), "detail": json.loads(row["detail"])})


def verify(connection: Connection, shipped: Head | str | None = None) -> AuditReport:
    """Recomputes the chain from its first row.

    Removing the newest rows and setting policy_state back leaves a shorter chain that is whole in itself: only a
    head that was shipped elsewhere shows it, so pass one where there is one: a Head, or the hash of any row alone.
    """
    previous, seq, version = GENESIS, 0, None
    wanted_seq = shipped.seq if isinstance(shipped, Head) else None
    wanted = shipped.hash if isinstance(shipped, Head) else shipped
    shipped_seen = wanted is None or (wanted == GENESIS and not wanted_seq)
    state = None

    def report(first_bad: int | None, problem: str | None) -> AuditReport:
        return AuditReport(problem is None, seq, Head(seq, previous), first_bad, problem, shipped is not None)

    # One statement, hence one snapshot: rows written meanwhile are in neither half.
    rows = select(
        PolicyState.version.label("state_version"), PolicyState.audit_seq, PolicyState.audit_hash, AuditRow.__table__
    ).outerjoin_from(PolicyState, AuditRow, true())
    for row in connection.execute(rows.order_by(AuditRow.seq), execution_options={"yield_per": 1000}).mappings():
        state = row
        if row["seq"] is None:
            break
        if row["seq"] != seq + 1:
            return report(seq + 1, f"row {seq + 1} is missing and row {row['seq']} follows")
        if row["prev_hash"] != previous:
            return report(seq + 1, "it does not continue the row before it")
        if row["hash"] != _hash_or_none(row):
            return report(seq + 1, "its content does not match its hash")
        seq, previous, version = row["seq"], row["hash"], row["policy_version"]
        if seq == wanted_seq and previous != wanted:
            return report(seq, "it is not the row whose hash was shipped")
        shipped_seen = shipped_seen or previous == wanted
    if state is None:
        return report(None, "the row that holds the policy version is missing")
    if (state["audit_seq"], state["audit_hash"]) != (seq, previous):
        return report(seq + 1, f"the database says the last row is {state['audit_seq']}, and the log ends at {seq}")
    if version is not None and state["state_version"] != version:
        return report(None, f"the policy version is {state['state_version']}, and the last row says {version}")
    if not shipped_seen:
        place = "in no row" if wanted_seq is None else f"row {wanted_seq}"
        return report(seq + 1, f"the shipped head is {place}, and the log ends at {seq}")
    return report(None, None)


def _hash_or_none(row: Any) -> str | None:
    try:
        return row_hash(row)
    except TextInvalid:
        return None
