"""Carries deletion requests forward, one persisted step at a time. Killed anywhere, it goes on where it stopped.

Each step reads the facts, asks ``deletions.next_move`` and acts. Acts outside the database (policy's quarantine, the
vault) come before the state change that records them and can be repeated; the state change checks that the state is
still the one that was read.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, and_, func, or_, select, update
from sqlalchemy.exc import DBAPIError

from coordinator import job_queue, plans, purging, requests, revisions
from coordinator.certify import attested, issue_receipt
from coordinator.core import Coordinator
from coordinator.db import now, reading, writing
from coordinator.deletions import WORKING, Act, Job, Move, Situation, State, next_move
from coordinator.job_queue import JobState
from coordinator.jobs import JobTable
from coordinator.models import deletion_requests, jobs
from coordinator.models import revisions as revision_table
from coordinator.outbox import COORDINATOR, Carrier
from coordinator.reconcile import Reconciler
from coordinator.revisions import RevisionState
from coordinator.silos import require_silo
from coordinator.upkeep import Upkeep
from policy.errors import PolicyError
from seqr.errors import SeqrError

logger = logging.getLogger(__name__)

_BEFORE_ITS_TURN = (
    State.RECEIVED,
    State.VERIFIED,
    State.ACCEPTED,
    State.QUARANTINED,
    State.NEEDS_INPUT,
    State.WAITING_FOR_SILO,
)
_REASONS = {
    State.VERIFIED: "the silo is known and the filer holds a key that may file",
    State.ACCEPTED: "the request can be carried out",
    State.QUARANTINED: "the silo serves nobody until the new adapter is in place",
    State.DATA_REMOVED: "the silo attests that the records are gone",
    State.RETRAINING: "the silo has retrained without the records",
    State.VALIDATING: "the new adapter waits for a gateway's intake",
    State.PUBLISHED: "the new adapter is active",
    State.PURGED: "no gateway holds an older adapter and their keys are destroyed",
    State.CERTIFIED: "the receipt is signed",
    State.REJECTED: "the silo has nothing to delete",
    State.WAITING_FOR_SILO: "the silo is not connected",
    State.NEEDS_INPUT: "an admin has to create a plan",
    State.FAILED: "a privacy officer has to look at it and retry",
}


@dataclass(frozen=True)
class _Facts:
    """A request as read from the database, with the situation it is in."""

    row: Any
    situation: Situation
    # Revisions of the silo with a lower number than this are to go.
    below: int | None


class Driver:
    """The coordinator's loop body. Threads may call it; they take turns."""

    def __init__(self, coordinator: Coordinator, reconciler: Reconciler) -> None:
        self._c = coordinator
        self._jobs = JobTable(coordinator)
        self._reconciler = reconciler
        self._upkeep = Upkeep(coordinator)
        self._carrier = Carrier(coordinator.engine, coordinator.policy)
        self._lock = threading.RLock()
        self._put_off: dict[str, str] = {}

    def tick(self) -> None:
        """Do everything that can be done now. A chore that fails is logged and tried again at the next tick."""
        with self._lock:
            self._try("jobs", self._jobs.requeue_expired)
            self._try("silos", self._reconciler.catch_up)
            self._try("revisions", lambda: purging.destroy_purged(self._c))
            for request_id in self._open_requests():
                self._try(request_id, lambda request_id=request_id: self.advance(request_id))  # type: ignore[misc]
            self._try("quarantines", self._upkeep.keep_quarantines)
            self._try("lifting", self._upkeep.lift_quarantines)
            self._try("forgetting", self._upkeep.forget_subjects)
            self._try("clocks", self._upkeep.warn)
            self._try("audit", self._carrier.deliver)

    def advance(self, request_id: str) -> None:
        """Carry one request as far as it goes without waiting. Raises CoordinatorError, PolicyError."""
        with self._lock:
            while self._step(request_id):
                pass

    def quarantine_at_once(self, request_id: str) -> None:
        """Called before a filing is answered: from here on the silo's adapter serves nobody. Raises PolicyError."""
        with self._lock:
            while self._state(request_id) in (State.RECEIVED, State.VERIFIED, State.ACCEPTED):
                self._step(request_id)

    def _step(self, request_id: str) -> bool:
        with reading(self._c.engine) as connection:
            facts = self._facts(connection, request_id)
        move = next_move(facts.situation)
        if move is None:
            return False
        match move.act:
            case Act.QUARANTINE:
                self._upkeep.quarantine(facts.row["silo_id"], facts.row["restore_status"])
                return self._enter(facts, move, {"quarantined_at": now()})
            case Act.START_JOB:
                return self._start_job(facts)
            case Act.TAKE_ATTESTATION:
                return self._take_attestation(facts, move)
            case Act.PURGE:
                return self._purge(facts)
            case Act.CERTIFY:
                return self._certify(facts, move)
            case _:
                extra = {"published_at": now()} if move.to is State.PUBLISHED else {}
                return self._enter(facts, move, extra)

    def _enter(self, facts: _Facts, move: Move, values: dict[str, Any]) -> bool:
        with writing(self._c.engine) as connection:
            return self._enter_in(connection, facts, move, values)

    def _enter_in(self, connection: Connection, facts: _Facts, move: Move, values: dict[str, Any]) -> bool:
        row = requests.locked(connection, facts.row["request_id"])
        if move.to is None or row["state"] != facts.row["state"] or row["job_id"] != facts.row["job_id"]:
            return False
        told = {"code": move.code, "message": move.message, **values}
        requests.enter(connection, row, move.to, COORDINATOR, _REASONS[move.to], told)
        return True

    def _start_job(self, facts: _Facts) -> bool:
        row = facts.row
        with writing(self._c.engine) as connection:
            fresh = requests.locked(connection, row["request_id"])
            live = job_queue.live_job(connection, row["silo_id"])
            if fresh["job_id"] is not None or (live is not None and live["state"] != JobState.QUEUED):
                return False
            if live is not None:
                job_queue.cancel(connection, live["job_id"], COORDINATOR, "a deletion request comes first")
            reason = "carries out a deletion request"
            job_id = job_queue.enqueue(connection, row["silo_id"], "erase", COORDINATOR, reason, row["request_id"])
            change = update(deletion_requests).where(deletion_requests.c.request_id == row["request_id"])
            connection.execute(change.values(job_id=job_id, attempts=row["attempts"] + 1))
        return True

    def _take_attestation(self, facts: _Facts, move: Move) -> bool:
        with writing(self._c.engine) as connection:
            job = job_queue.get(connection, facts.row["job_id"])
            new = select(revision_table.c.revision_id).where(revision_table.c.job_id == job["job_id"])
            values = {"attestation": job["attestation"], "revision_id": connection.execute(new).scalar()}
            old = attested(job["attestation"]).old_adapter_digest
            purging.learn_digest(connection, job["silo_id"], job["revision"], old)
            return self._enter_in(connection, facts, move, values)

    def _purge(self, facts: _Facts) -> bool:
        """Destroy what no gateway holds any more; True when nothing older is left."""
        silo_id, number, why = facts.row["silo_id"], facts.below or 0, "carries out a deletion request"
        with writing(self._c.engine) as connection:
            require_silo(connection, silo_id, lock=True)
            revisions.retire_below(connection, silo_id, number, why)
            older = revisions.below(connection, silo_id, number)
            purging.bury(connection, older)
            # What gateways may still hold, or have looked at under a known digest, was retired just now.
            idle = (RevisionState.STAGED, RevisionState.QUARANTINED)
            ready = [row for row in older if row["state"] in idle]
            ready += [
                row for row in older if row["state"] == RevisionState.RETIRED and purging.is_purged(connection, row)
            ]
        for row in ready:
            revisions.destroy(self._c, row["revision_id"], why)
        with reading(self._c.engine) as connection:
            return _all_destroyed(connection, silo_id, number)

    def _certify(self, facts: _Facts, move: Move) -> bool:
        with writing(self._c.engine) as connection:
            row = requests.locked(connection, facts.row["request_id"])
            if row["state"] != State.PURGED:
                return False
            try:
                issue_receipt(self._c, connection, row, facts.below or 0)
            except SeqrError as error:
                # The adapter is gone and replaced; what is missing is a receipt that would stand up to a check.
                requests.remark(connection, row, error.code, str(error))
                return False
            return self._enter_in(connection, facts, move, {})

    def _open_requests(self) -> list[str]:
        with reading(self._c.engine) as connection:
            query = select(deletion_requests.c.request_id).where(deletion_requests.c.closed_at.is_(None))
            return list(connection.execute(query.order_by(deletion_requests.c.number)).scalars())

    def _state(self, request_id: str) -> State:
        with reading(self._c.engine) as connection:
            return State(requests.get(connection, request_id)["state"])

    def _facts(self, connection: Connection, request_id: str) -> _Facts:
        row = requests.get(connection, request_id)
        state = State(row["state"])
        job, number = self._job(connection, row), None
        claim = attested(row["attestation"]) if row["attestation"] else None
        revision = revisions.get(connection, row["revision_id"]) if row["revision_id"] else None
        if row["attestation"] and row["job_id"]:
            number = job_queue.get(connection, row["job_id"])["revision"]
        situation = Situation(
            state=state,
            its_turn=_its_turn(connection, row),
            has_plan=plans.current_id(connection) is not None,
            job=job,
            nothing_left=claim is not None and claim.new_adapter_digest is None,
            revision_state=revision["state"] if revision else None,
            revision_code=revision["code"] if revision else None,
            revision_message=revision["message"] if revision else None,
            all_destroyed=state is State.PUBLISHED and _all_destroyed(connection, row["silo_id"], number or 0),
        )
        return _Facts(row, situation, number)

    def _job(self, connection: Connection, row: Any) -> Job | None:
        if row["job_id"] is None:
            return None
        job = job_queue.get(connection, row["job_id"])
        orders = select(func.sum(jobs.c.orders)).where(jobs.c.request_id == row["request_id"])
        return Job(
            state=job["state"],
            overdue=job_queue.overdue(job, self._c.settings.silo_grace_seconds, now()),
            code=job["code"],
            message=job["message"],
            first_order=(connection.execute(orders).scalar() or 0) <= 1,
        )

    def _try(self, what: str, chore: Callable[[], object]) -> None:
        why = ""
        try:
            chore()
        except (SeqrError, PolicyError) as error:
            why = error.code
        except (DBAPIError, OSError) as error:
            why = type(error).__name__
        # Several ticks a second: an outage is worth one line, and so is its end.
        if why != self._put_off.pop(what, ""):
            logger.warning("%s: %s", what, f"put off ({why})" if why else "goes on")
        if why:
            self._put_off[what] = why


def _its_turn(connection: Connection, row: Any) -> bool:
    """One request at a time per silo, oldest first; a failed one lets the next pass; a job under way is waited for."""
    live = job_queue.live_job(connection, row["silo_id"])
    if live is not None and live["state"] == JobState.DISPATCHED:
        return False
    other = deletion_requests
    ahead = select(other.c.request_id).where(
        other.c.silo_id == row["silo_id"],
        other.c.request_id != row["request_id"],
        or_(
            other.c.state.in_(WORKING),
            and_(other.c.state.in_(_BEFORE_ITS_TURN), other.c.number < row["number"]),
            and_(other.c.state.in_(_BEFORE_ITS_TURN), other.c.job_id.is_not(None)),
        ),
    )
    return connection.execute(ahead.limit(1)).first() is None


def _all_destroyed(connection: Connection, silo_id: str, number: int) -> bool:
    """Whether every older revision is destroyed and its adapter can never come back."""
    older = revisions.below(connection, silo_id, number)
    gone = all(row["state"] == RevisionState.DESTROYED for row in older)
    return gone and not purging.unburied(connection, older)
