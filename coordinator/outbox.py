"""Audit rows on their way from the coordinator's transactions to policy's audit chain."""

import secrets
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Engine, delete, insert, select

from coordinator.db import reading, writing
from coordinator.models import outbox
from policy.models import AuditRow
from policy.store import PolicyStore

COORDINATOR = "coordinator"


def record(connection: Connection, actor: str, action: str, detail: Mapping[str, Any], reason: str) -> None:
    """Note an audit row in the transaction it describes. ``detail`` must name no subject."""
    event_id = "evt-" + secrets.token_hex(8)
    row = {"event_id": event_id, "actor": actor, "action": action, "detail": dict(detail), "reason": reason}
    connection.execute(insert(outbox).values(row))


class Carrier:
    """Carries rows over in order, each exactly once. One carrier works at a time (the loop's lock sees to it)."""

    def __init__(self, engine: Engine, store: PolicyStore) -> None:
        self._engine = engine
        self._store = store
        # After a crash or a failure the first row may have arrived without having been crossed off.
        self._first_may_have_arrived = True

    def deliver(self) -> int:
        """Carry over what waits; returns how many rows. Raises PolicyError when policy does not answer."""
        with reading(self._engine) as connection:
            waiting = connection.execute(select(outbox).order_by(outbox.c.number)).mappings().all()
        if not waiting:
            self._first_may_have_arrived = False
        for row in waiting:
            if not (self._first_may_have_arrived and self._has_arrived(row["event_id"])):
                self._first_may_have_arrived = True
                detail = {**row["detail"], "event_id": row["event_id"]}
                self._store.record_event(row["actor"], row["action"], detail, row["reason"])
            with writing(self._engine) as connection:
                connection.execute(delete(outbox).where(outbox.c.number == row["number"]))
            self._first_may_have_arrived = False
        return len(waiting)

    def _has_arrived(self, event_id: str) -> bool:
        with self._store.engine.connect() as connection:
            found = select(AuditRow.seq).where(AuditRow.detail.contains(f'"event_id":"{event_id}"', autoescape=True))
            return connection.execute(found.limit(1)).first() is not None
