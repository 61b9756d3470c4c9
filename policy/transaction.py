"""One change to the policy: lock, check the version, write, bump the version, append the audit row, commit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection, Engine, select

from policy import audit
from policy.db import named_database_errors, writing
from policy.errors import SchemaOutdated, VersionMismatch
from policy.ids import check_actor, check_reason
from policy.models import PolicyState
from policy.times import to_micros

__all__ = ["Change", "change", "named_database_errors"]

LOCKED_STATE: Final = select(PolicyState.version, PolicyState.audit_seq, PolicyState.audit_hash).with_for_update()


@dataclass
class Change:
    """An open transaction that holds the lock on policy_state, so nothing read in it can change under it."""

    connection: Connection
    actor: str
    reason: str
    now: int
    version: int
    head: audit.Head
    rows: int = 0

    def record(self, action: str, **detail: Any) -> int:
        """Appends the audit row of one step under the version this change will have. Returns its number."""
        self.rows += 1
        self.head = audit.append(
            self.connection,
            self.head,
            at=self.now,
            actor=self.actor,
            action=action,
            detail=detail,
            reason=self.reason,
            version=self.version,
        )
        return self.head.seq


@contextmanager
def change(
    engine: Engine,
    clock: Callable[[], datetime],
    *,
    actor: str,
    reason: str,
    expected_version: int | None = None,
    bump: bool = True,
    keep: bool = True,
) -> Iterator[Change]:
    """Everything done inside is committed together, or rolled back when it raises or when `keep` is false.

    Raises ActorMissing, ReasonMissing, VersionMismatch; PolicyBusy when the lock is not to be had.
    """
    check_actor(actor)
    check_reason(reason)
    with named_database_errors(), writing(engine).connect() as connection, connection.begin() as transaction:
        state = connection.execute(LOCKED_STATE).first()
        if state is None:
            raise SchemaOutdated
        version: int = state.version
        if expected_version is not None and version != expected_version:
            raise VersionMismatch(version, expected_version)
        last = audit.Head(state.audit_seq, state.audit_hash)
        yield Change(connection, actor, reason, to_micros(clock()), version + 1 if bump else version, last)
        if not keep:
            transaction.rollback()
