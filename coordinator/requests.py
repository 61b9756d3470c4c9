"""Deletion requests: filing one, ending one early, and what is shown of one. The driver does the rest."""

import secrets
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, insert, select, update

from coordinator import job_queue, outbox
from coordinator.core import Coordinator
from coordinator.db import Row, now, reading, writing
from coordinator.deletions import CLOSED, State, require
from coordinator.errors import (
    DeletionTooFarToWithdraw,
    DeletionUnknown,
    IllegalTransition,
    ReceiptNotReady,
    SubjectInReason,
)
from coordinator.models import deletion_events, deletion_requests, jobs, receipts, revisions
from coordinator.reconcile import policy_status
from coordinator.silos import require_silo
from coordinator.subjects import check_subject
from policy.errors import SiloUnknown as PolicySiloUnknown

# Shorter subjects turn up inside ordinary words.
_TELLING = 4
_OPEN_END = frozenset({State.QUARANTINED, State.NEEDS_INPUT, State.WAITING_FOR_SILO, State.FAILED})


def file(c: Coordinator, silo_id: str, subject: str, requested_by: str, reason: str, actor: str) -> str:
    """Take a request in and return its id; the caller has the driver quarantine the silo before it answers.

    A second request for a subject of which one is open becomes a duplicate. If the open one's name was lost with the
    keystore, it has it again, and can be retried. Raises SiloUnknown, SubjectInvalid, SubjectInReason; then nothing has
    changed.
    """
    check_subject(subject)
    if len(subject) >= _TELLING and subject.casefold() in reason.casefold():
        raise SubjectInReason("the reason repeats the subject; leave it out, because the reason outlives the deletion")
    subject_hash = c.subjects.hash(silo_id, subject)
    with reading(c.engine) as connection:
        require_silo(connection, silo_id)
    try:
        present = policy_status(c, silo_id)
    except PolicySiloUnknown:
        present = "active"  # approved a moment ago; policy hears of it from the reconciler
    request_id = "del-" + secrets.token_hex(8)
    moment = now()
    kept: list[str] = []

    def keep(whose: str) -> bytes:
        kept.append(whose)
        return c.subjects.keep(whose, subject, requested_by)

    try:
        with writing(c.engine) as connection:
            require_silo(connection, silo_id, lock=True)
            open_twin = _open_twin(connection, silo_id, subject_hash)
            if open_twin and not c.subjects.remembers(open_twin):
                twin = update(deletion_requests).where(deletion_requests.c.request_id == open_twin)
                connection.execute(twin.values(subject_sealed=keep(open_twin)))
            row = {
                "request_id": request_id,
                "silo_id": silo_id,
                "subject_hash": subject_hash,
                "subject_sealed": None if open_twin else keep(request_id),
                "reason": reason,
                "filed_by": actor,
                "state": State.RECEIVED,
                "received_at": moment,
                "due_at": moment + timedelta(days=c.settings.deletion_due_days),
                "warned_percent": 0,
                "attempts": 0,
                "restore_status": None if open_twin else _restore_status(connection, silo_id, present),
            }
            if open_twin:
                row |= {"state": State.DUPLICATE, "closed_at": moment, "duplicate_of": open_twin}
            connection.execute(insert(deletion_requests).values(row))
            note(connection, {**row, "state": None}, State.RECEIVED, actor, {}, reason)
            if open_twin:
                detail = {"duplicate_of": open_twin}
                note(connection, {**row, "state": State.RECEIVED}, State.DUPLICATE, actor, detail, reason)
    except BaseException:
        for whose in kept:
            c.subjects.forget(whose)
        raise
    return request_id


def retry(c: Coordinator, request_id: str, actor: str, reason: str) -> None:
    """Give a failed request to the silo once more. Raises DeletionUnknown, IllegalTransition."""
    with writing(c.engine) as connection:
        row = locked(connection, request_id)
        values = {"job_id": None, "revision_id": None, "code": None, "message": None}
        if row["state"] != State.FAILED:
            raise IllegalTransition("the deletion request", row["state"], "retried")
        enter(connection, row, State.QUARANTINED, actor, reason, values, {"retry": True})


def withdraw(c: Coordinator, request_id: str, actor: str, reason: str) -> None:
    """End a request that no silo has begun to carry out. Raises DeletionUnknown, DeletionTooFarToWithdraw."""
    with writing(c.engine) as connection:
        row = locked(connection, request_id)
        if row["state"] in CLOSED:
            require(State(row["state"]), State.WITHDRAWN)
        sent = select(jobs.c.job_id).where(jobs.c.request_id == request_id, jobs.c.orders > 0)
        if row["state"] not in _OPEN_END or connection.execute(sent).first() is not None:
            raise DeletionTooFarToWithdraw(
                "the silo has been told to remove the records already; the request can only be completed now"
            )
        live = job_queue.live_job(connection, row["silo_id"])
        if live is not None and live["request_id"] == request_id:
            job_queue.cancel(connection, live["job_id"], actor, reason)
        enter(connection, row, State.WITHDRAWN, actor, reason, {"message": "withdrawn before anything was removed"})


def enter(
    connection: Connection,
    row: Row,
    state: State,
    actor: str,
    reason: str,
    values: Mapping[str, object] | None = None,
    detail: Mapping[str, object] | None = None,
) -> None:
    """Change a request's state with everything that belongs to it, in the caller's transaction."""
    require(State(row["state"]), state)
    changes: dict[str, Any] = {"state": state, **(values or {})}
    if state in CLOSED:
        changes |= {"closed_at": now(), "subject_sealed": None}
    change = update(deletion_requests).where(
        deletion_requests.c.request_id == row["request_id"], deletion_requests.c.state == row["state"]
    )
    connection.execute(change.values(changes))
    note(connection, row, state, actor, {**_told(changes), **(detail or {})}, reason)


def note(connection: Connection, row: Row, state: State, actor: str, detail: Mapping[str, object], reason: str) -> None:
    """One line of the request's history, and its audit row."""
    line = {"request_id": row["request_id"], "at": now(), "actor": actor, "to_state": state, "detail": dict(detail)}
    connection.execute(insert(deletion_events).values(from_state=row["state"], **line))
    told = {"request_id": row["request_id"], "silo_id": row["silo_id"], "from": row["state"], **detail}
    outbox.record(connection, actor, f"deletion.{state}", told, reason)


def remark(connection: Connection, row: Row, code: str, message: str) -> None:
    """Say why the request does not go on, where it can be seen; once per reason."""
    if row["code"] == code:
        return
    change = update(deletion_requests).where(deletion_requests.c.request_id == row["request_id"])
    connection.execute(change.values(code=code[:64], message=message[:300]))
    told = {"request_id": row["request_id"], "silo_id": row["silo_id"], "state": row["state"], "code": code}
    outbox.record(connection, outbox.COORDINATOR, "deletion.stuck", told, "somebody has to look at it")


def warn(connection: Connection, row: Row, percent: int) -> None:
    """Note, once, that so much of the request's time is gone."""
    reached = update(deletion_requests).where(
        deletion_requests.c.request_id == row["request_id"], deletion_requests.c.warned_percent < percent
    )
    if connection.execute(reached.values(warned_percent=percent)).rowcount:
        told = {"request_id": row["request_id"], "silo_id": row["silo_id"], "state": row["state"], "percent": percent}
        outbox.record(connection, outbox.COORDINATOR, "deletion.clock", told, "the due date comes closer")


def locked(connection: Connection, request_id: str) -> Row:
    """The request, its silo locked. Raises DeletionUnknown."""
    require_silo(connection, get(connection, request_id)["silo_id"], lock=True)
    return get(connection, request_id)


def get(connection: Connection, request_id: str) -> Row:
    """Raises DeletionUnknown."""
    query = select(deletion_requests).where(deletion_requests.c.request_id == request_id)
    row = connection.execute(query).mappings().first()
    if row is None:
        raise DeletionUnknown(f"there is no deletion request {request_id!r:.80}")
    return row


def listing(connection: Connection, silo_id: str | None = None, limit: int = 200) -> list[Row]:
    """Newest first."""
    query = select(deletion_requests).order_by(deletion_requests.c.number.desc()).limit(limit)
    if silo_id is not None:
        query = query.where(deletion_requests.c.silo_id == silo_id)
    return list(connection.execute(query).mappings())


def history(connection: Connection, request_id: str) -> list[dict[str, Any]]:
    """Every state the request has been in, oldest first."""
    query = select(deletion_events).where(deletion_events.c.request_id == request_id).order_by(deletion_events.c.number)
    return [
        {name: row[name] for name in ("at", "actor", "from_state", "to_state", "detail")}
        for row in connection.execute(query).mappings()
    ]


def receipt(connection: Connection, request_id: str) -> bytes:
    """The signed receipt. Raises DeletionUnknown, ReceiptNotReady."""
    row = get(connection, request_id)
    found = connection.execute(select(receipts.c.envelope).where(receipts.c.request_id == request_id)).scalar()
    if found is None:
        raise ReceiptNotReady(f"request {request_id} is '{row['state']}'; its receipt is made when it is certified")
    return bytes(found)


def view(connection: Connection, row: Row, at: datetime) -> dict[str, Any]:
    """What a caller sees of a request: everything but the subject and who asked."""
    names = ("request_id", "silo_id", "subject_hash", "state", "reason", "filed_by", "received_at", "due_at")
    more = ("closed_at", "quarantined_at", "published_at", "duplicate_of", "attempts", "job_id", "code", "message")
    number = None
    if row["revision_id"] is not None:
        number = connection.execute(
            select(revisions.c.revision).where(revisions.c.revision_id == row["revision_id"])
        ).scalar()
    return {
        **{name: row[name] for name in (*names, *more)},
        "new_revision": number,
        "clock": clock(row, at),
    }


def clock(row: Row, at: datetime) -> dict[str, Any]:
    """How much of the time is gone: days left, percent used, and whether the due date is missed."""
    end = row["closed_at"] or at
    used = (end - row["received_at"]) / (row["due_at"] - row["received_at"])
    return {
        "days_left": round((row["due_at"] - end) / timedelta(days=1), 1),
        "percent_used": int(100 * used),
        "overdue": end > row["due_at"],
        "running": row["closed_at"] is None,
    }


def _open_twin(connection: Connection, silo_id: str, subject_hash: str) -> str | None:
    query = select(deletion_requests.c.request_id).where(
        deletion_requests.c.silo_id == silo_id,
        deletion_requests.c.subject_hash == subject_hash,
        deletion_requests.c.closed_at.is_(None),
    )
    return connection.execute(query).scalar()


def _restore_status(connection: Connection, silo_id: str, present: str) -> str:
    """What the silo's policy status was before any open request took it out."""
    query = (
        select(deletion_requests.c.restore_status)
        .where(
            deletion_requests.c.silo_id == silo_id,
            deletion_requests.c.restore_status.is_not(None),
            deletion_requests.c.lifted_at.is_(None),
            deletion_requests.c.state.not_in((State.DUPLICATE,)),
        )
        .order_by(deletion_requests.c.number)
    )
    return connection.execute(query.limit(1)).scalar() or present


def _told(changes: Mapping[str, object]) -> dict[str, Any]:
    return {name: changes[name] for name in ("code", "message", "job_id", "revision_id") if changes.get(name)}
