"""The queue of jobs: one live job per silo, the transition table, and what admins and the driver do to it.

Every function belongs to its caller's transaction.
"""

import secrets
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from coordinator import outbox, plans
from coordinator.db import Row, now
from coordinator.deletions import HOLDING
from coordinator.errors import (
    IllegalTransition,
    JobAlreadyLive,
    JobKindInvalid,
    JobUnknown,
    SiloNotApproved,
    SiloQuarantined,
)
from coordinator.models import deletion_requests, jobs
from coordinator.silos import require_silo

_MAX_MESSAGE = 300


class JobState(StrEnum):
    QUEUED = "queued"
    DISPATCHED = "dispatched"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


J = JobState

TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    # Succeeded without being dispatched: the reply of a job that had been given up and queued again.
    J.QUEUED: frozenset({J.DISPATCHED, J.SUCCEEDED, J.FAILED, J.CANCELLED}),
    J.DISPATCHED: frozenset({J.QUEUED, J.SUCCEEDED, J.FAILED, J.CANCELLED}),
    J.SUCCEEDED: frozenset(),
    J.FAILED: frozenset(),
    J.CANCELLED: frozenset(),
}
LIVE = frozenset(state for state, following in TRANSITIONS.items() if following)


def enqueue(
    connection: Connection, silo_id: str, kind: str, actor: str, reason: str, request_id: str | None = None
) -> str:
    """Queue a job in the caller's transaction and return its id.

    Raises JobKindInvalid, SiloUnknown, SiloNotApproved, SiloQuarantined, PlanMissing, JobAlreadyLive.
    """
    if kind not in ("train", "ping") and not (kind == "erase" and request_id is not None):
        raise JobKindInvalid("a job is of kind train or ping; an erase job is made by filing a deletion request")
    silo = require_silo(connection, silo_id, lock=True)
    if silo["status"] != "approved" and kind != "erase":
        raise SiloNotApproved(f"silo {silo_id} is {silo['status']}; approve it before giving it work")
    if kind == "train" and is_held(connection, silo_id):
        raise SiloQuarantined(f"silo {silo_id} is quarantined for a deletion request, which retrains it by itself")
    plan_id = plans.current(connection)
    job_id = "job-" + secrets.token_hex(8)
    highest = connection.execute(select(func.max(jobs.c.revision)).where(jobs.c.silo_id == silo_id)).scalar() or 0
    moment = now()
    row = {
        "job_id": job_id,
        "silo_id": silo_id,
        "plan_id": plan_id,
        "kind": kind,
        "state": J.QUEUED,
        "revision": 0 if kind == "ping" else highest + 1,
        "request_id": request_id,
        "nonce": "",
        "orders": 0,
        "attempts": 0,
        "created_at": moment,
        "created_by": actor,
        "queued_at": moment,
    }
    try:
        with connection.begin_nested():
            connection.execute(insert(jobs).values(row))
    except IntegrityError:
        raise JobAlreadyLive(
            f"silo {silo_id} has a job already; wait for it, or `seqr coordinator cancel` it"
        ) from None
    detail = {"job_id": job_id, "silo_id": silo_id, "kind": kind, "request_id": request_id, "plan_id": plan_id}
    outbox.record(connection, actor, "job.queued", detail, reason)
    return job_id


def cancel(connection: Connection, job_id: str, actor: str, reason: str) -> None:
    """Give up a job that is not over; a reply that still comes is dropped. Raises JobUnknown, IllegalTransition."""
    job = locked(connection, job_id)
    if J.CANCELLED not in TRANSITIONS[J(job["state"])]:
        raise IllegalTransition(f"job {job_id}", job["state"], J.CANCELLED)
    finish(connection, job, {"state": J.CANCELLED, "code": "job_cancelled", "message": "cancelled"}, actor, reason)


def live_job(connection: Connection, silo_id: str) -> Row | None:
    """The silo's one live job, if it has one."""
    query = select(jobs).where(jobs.c.silo_id == silo_id, jobs.c.state.in_(LIVE))
    return connection.execute(query).mappings().first()


def get(connection: Connection, job_id: str) -> Row:
    """Raises JobUnknown."""
    job = connection.execute(select(jobs).where(jobs.c.job_id == job_id)).mappings().first()
    if job is None:
        raise JobUnknown(f"there is no job {job_id!r:.80}; list the jobs to find its id")
    return job


def listing(connection: Connection, silo_id: str | None = None, limit: int = 200) -> list[Row]:
    """Newest first."""
    query = select(jobs).order_by(jobs.c.created_at.desc(), jobs.c.job_id).limit(limit)
    if silo_id is not None:
        query = query.where(jobs.c.silo_id == silo_id)
    return list(connection.execute(query).mappings())


def is_held(connection: Connection, silo_id: str, besides: str = "") -> bool:
    """Whether an open deletion request (other than ``besides``) keeps the silo in quarantine."""
    held = select(deletion_requests.c.request_id).where(
        deletion_requests.c.silo_id == silo_id,
        deletion_requests.c.state.in_(HOLDING),
        deletion_requests.c.request_id != besides,
    )
    return connection.execute(held.limit(1)).first() is not None


def overdue(job: Row, grace_seconds: float, at: datetime) -> bool:
    """Whether a queued job has waited so long that its silo must be away."""
    queued_at: datetime = job["queued_at"]
    return at - queued_at >= timedelta(seconds=grace_seconds)


def locked(connection: Connection, job_id: str) -> Row:
    job = connection.execute(select(jobs).where(jobs.c.job_id == job_id).with_for_update()).mappings().first()
    if job is None:
        raise JobUnknown(f"there is no job {job_id!r:.80}; list the jobs to find its id")
    return job


def give_back(connection: Connection, job: Row, most: int, why: str, new_order: bool = False) -> str:
    attempts = job["attempts"] + 1
    if attempts >= most:
        return finish(connection, job, failure("attempts_exhausted", f"given up after {attempts} attempts: {why}"))
    values = {"state": J.QUEUED, "queued_at": now(), "attempts": attempts, "message": why[:_MAX_MESSAGE]}
    if new_order:
        values["issued_at"] = None
    connection.execute(update(jobs).where(jobs.c.job_id == job["job_id"]).values(values))
    return str(J.QUEUED)


def finish(
    connection: Connection,
    job: Row,
    values: dict[str, Any],
    actor: str = outbox.COORDINATOR,
    reason: str = "the job is over",
) -> str:
    connection.execute(update(jobs).where(jobs.c.job_id == job["job_id"]).values(**values, finished_at=now()))
    detail = {"job_id": job["job_id"], "silo_id": job["silo_id"], "kind": job["kind"], "code": values.get("code")}
    outbox.record(connection, actor, f"job.{values['state']}", detail, reason)
    return str(values["state"])


def failure(code: str, message: str) -> dict[str, Any]:
    return {"state": J.FAILED, "code": code[:64], "message": message[:_MAX_MESSAGE]}
