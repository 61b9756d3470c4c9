"""What is looked after at every tick, whatever state a request is in: quarantines, forgetting, and the clock.

Every call may be repeated.
"""

import logging

from sqlalchemy import select, update

from coordinator import job_queue, requests
from coordinator.core import Coordinator
from coordinator.db import forget_deleted_bytes, now, reading, writing
from coordinator.deletions import HOLDING, LIFTING
from coordinator.models import deletion_requests
from coordinator.outbox import COORDINATOR
from coordinator.reconcile import policy_status
from coordinator.silos import require_silo
from policy.errors import SiloStatusChanged

logger = logging.getLogger(__name__)

WARNINGS = (50, 80, 100)


class Upkeep:
    """The chores of one coordinator."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._c = coordinator

    def quarantine(self, silo_id: str, before: str | None = None) -> None:
        """Take the silo from everybody; ``before`` is what its status was. Raises PolicyError."""
        present = policy_status(self._c, silo_id)
        if present != "quarantined":
            self._c.policy.set_silo_status(
                silo_id,
                "quarantined",
                expected_status=present,
                actor=COORDINATOR,
                reason=f"an open deletion request (the silo was {before or present})",
            )

    def keep_quarantines(self) -> None:
        """Nobody, not even an admin at policy's own command line, can put a silo back while a request is open."""
        with reading(self._c.engine) as connection:
            query = select(deletion_requests.c.silo_id).where(deletion_requests.c.state.in_(HOLDING)).distinct()
            held = connection.execute(query).scalars().all()
        for silo_id in held:
            self.quarantine(silo_id)

    def lift_quarantines(self) -> None:
        """Give back what a request held, unless another one still holds it."""
        with reading(self._c.engine) as connection:
            due = select(deletion_requests.c.request_id).where(
                deletion_requests.c.state.in_(LIFTING),
                deletion_requests.c.quarantined_at.is_not(None),
                deletion_requests.c.lifted_at.is_(None),
            )
            ids = connection.execute(due).scalars().all()
        for request_id in ids:
            with writing(self._c.engine) as connection:
                # The lock on the silo makes a filing of this moment wait, so that it quarantines after the lifting.
                row = requests.locked(connection, request_id)
                silo = require_silo(connection, row["silo_id"])
                if not job_queue.is_held(connection, row["silo_id"], besides=request_id):
                    wanted = "suspended" if silo["status"] == "suspended" else row["restore_status"]
                    self._lift(row["silo_id"], wanted or "active", request_id)
                lifted = update(deletion_requests).where(deletion_requests.c.request_id == request_id)
                connection.execute(lifted.values(lifted_at=now()))

    def _lift(self, silo_id: str, wanted: str, request_id: str) -> None:
        if wanted == "quarantined":
            return
        try:
            self._c.policy.set_silo_status(
                silo_id,
                wanted,
                expected_status="quarantined",
                actor=COORDINATOR,
                reason=f"no open deletion request holds the silo since {request_id}",
            )
        except SiloStatusChanged:
            logger.info("silo %s is quarantined no more; left as it is", silo_id)

    def forget_subjects(self) -> None:
        """Once a request is closed: its subject's key, and what the write-ahead log still holds, are destroyed."""
        with reading(self._c.engine) as connection:
            query = select(deletion_requests.c.request_id).where(deletion_requests.c.closed_at.is_not(None))
            closed = connection.execute(query).scalars().all()
        remembered = [request_id for request_id in closed if self._c.subjects.remembers(request_id)]
        # The log first: as long as the key is there, a crash leaves a trace of what is still to be done.
        if remembered and forget_deleted_bytes(self._c.engine):
            for request_id in remembered:
                self._c.subjects.forget(request_id)

    def warn(self) -> None:
        """Note when half of a request's time is gone, four fifths, and all of it."""
        with reading(self._c.engine) as connection:
            query = select(deletion_requests).where(deletion_requests.c.closed_at.is_(None))
            running = connection.execute(query).mappings().all()
        for row in running:
            used = requests.clock(row, now())["percent_used"]
            reached = max((percent for percent in WARNINGS if percent <= used), default=0)
            if reached > row["warned_percent"]:
                with writing(self._c.engine) as connection:
                    requests.warn(connection, row, reached)
                logger.warning("deletion request %s has used %d%% of its time", row["request_id"], reached)
