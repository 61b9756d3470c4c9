"""Jobs on their way to a silo and back.

``JobTable`` is what the Flower ServerApp works with, from a process of its own that shares the database and the state
directory. Every call may be repeated: a reply that has been taken is not taken twice, a job that is done stays done.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection, select, update

from coordinator import plans, revisions
from coordinator.core import Coordinator
from coordinator.db import Row, now, reading, writing
from coordinator.errors import AttestationInvalid, BundleDestroyed
from coordinator.job_queue import LIVE, J, failure, finish, give_back, locked
from coordinator.models import deletion_requests, jobs, silos
from coordinator.silos import signing_keys
from seqr.document import utc_text
from seqr.dsse import Envelope
from seqr.errors import SeqrError
from seqr.job import ErasureAttestation, JobOrder, new_nonce, sign_job, verify_attestation

MAX_ATTESTATION_BYTES = 16 * 1024 * 1024
_CODE = re.compile(r"[a-z][a-z0-9_]{0,63}", re.ASCII)
# Answers that say nothing about the work: it is asked for again, under a new order where this one can be no more used.
_ASK_AGAIN = frozenset({"silo_busy", "reply_destroyed", "order_expired"})


@dataclass(frozen=True)
class DispatchedJob:
    """A job on its way: the signed order and the signed plan, as bytes of their DSSE envelopes."""

    job_id: str
    silo_id: str
    order_envelope: bytes
    plan_envelope: bytes


@dataclass(frozen=True)
class JobReply:
    """A silo's answer. ``status`` is ok or error; ``sealed`` the bundle, ``attestation`` a DSSE envelope (erase)."""

    status: str
    code: str = ""
    message: str = ""
    sealed: bytes | None = None
    attestation: bytes | None = None


class JobTable:
    """The functions of the ServerApp."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._c = coordinator
        self._engine = coordinator.engine

    def claim_next(self, online_silos: Collection[str]) -> list[DispatchedJob]:
        """Mark every queued job of these silos as dispatched and return it, oldest first."""
        claimed: list[DispatchedJob] = []
        if not online_silos:
            return claimed
        with writing(self._engine) as connection:
            waiting = (
                select(jobs)
                .join(silos)
                .where(jobs.c.state == J.QUEUED, jobs.c.silo_id.in_(sorted(online_silos)), silos.c.status == "approved")
                .order_by(jobs.c.queued_at, jobs.c.job_id)
                .with_for_update(of=jobs, skip_locked=True)
            )
            for job in connection.execute(waiting).mappings().all():
                dispatched = self._dispatch(connection, job)
                if dispatched is not None:
                    claimed.append(dispatched)
        return claimed

    def requeue(self, job_id: str, why: str) -> None:
        """Give a dispatched job back to the queue, or fail it after too many attempts; else do nothing."""
        with writing(self._engine) as connection:
            job = locked(connection, job_id)
            if job["state"] == J.DISPATCHED:
                give_back(connection, job, self._c.settings.job_attempts, why)

    def requeue_all_dispatched(self) -> int:
        """At the ServerApp's start nothing can be under way any more. Costs no attempt; returns how many jobs."""
        with writing(self._engine) as connection:
            stranded = update(jobs).where(jobs.c.state == J.DISPATCHED)
            return connection.execute(stranded.values(state=J.QUEUED, queued_at=now())).rowcount

    def requeue_expired(self) -> None:
        """Give back jobs whose order has run out unanswered."""
        with reading(self._engine) as connection:
            expired = select(jobs.c.job_id).where(jobs.c.state == J.DISPATCHED, jobs.c.expires_at < now())
            ids = connection.execute(expired).scalars().all()
        for job_id in ids:
            self.requeue(job_id, "the order expired without an answer")

    def complete(self, job_id: str, reply: JobReply) -> str:
        """Take a silo's reply and return the job's state. A reply to a job that is over changes nothing."""
        with writing(self._engine) as connection:
            job = locked(connection, job_id)
            if job["state"] not in LIVE or (reply.status != "ok" and job["state"] == J.QUEUED):
                return str(job["state"])
            if reply.status != "ok" and reply.code in _ASK_AGAIN:
                new_order = reply.code != "silo_busy"
                return give_back(connection, job, self._c.settings.job_attempts, reply.code, new_order)
            try:
                values = self._take(connection, job, reply)
            except SeqrError as error:
                values = failure(error.code, str(error))
            return finish(connection, job, values)

    def _dispatch(self, connection: Connection, job: Row) -> DispatchedJob | None:
        moment = now()
        values: dict[str, Any] = {"state": J.DISPATCHED, "dispatched_at": moment}
        if job["issued_at"] is None or job["expires_at"] <= moment:
            lifetime = timedelta(days=self._c.settings.job_lifetime_days)
            values |= {
                "nonce": new_nonce(),
                "orders": job["orders"] + 1,
                "issued_at": moment.replace(microsecond=0),
                "expires_at": moment.replace(microsecond=0) + lifetime,
            }
        try:
            order = self._order(connection, {**job, **values})
        except BundleDestroyed:
            said = "its deletion request is closed, or the name in it was lost with the keystore"
            finish(connection, job, {"state": J.CANCELLED, "message": said})
            return None
        connection.execute(update(jobs).where(jobs.c.job_id == job["job_id"]).values(values))
        # Signing is deterministic, so an order that is sent again has the very bytes the silo has seen before.
        envelope = sign_job(order, self._c.key).to_json()
        return DispatchedJob(job["job_id"], job["silo_id"], envelope, plans.envelope(connection, job["plan_id"]))

    def _order(self, connection: Connection, job: Row) -> JobOrder:
        subject = None
        if job["kind"] == "erase":
            sealed = connection.execute(
                select(deletion_requests.c.subject_sealed).where(deletion_requests.c.request_id == job["request_id"])
            ).scalar_one()
            if sealed is None:
                raise BundleDestroyed("the subject of a closed deletion request is forgotten")
            subject, _ = self._c.subjects.reveal(job["request_id"], sealed)
        return JobOrder(
            job_id=job["job_id"],
            kind=job["kind"],
            silo_id=job["silo_id"],
            plan_id=job["plan_id"],
            revision=job["revision"],
            nonce=job["nonce"],
            issued_at=utc_text(job["issued_at"]),
            expires_at=utc_text(job["expires_at"]),
            subject=subject,
            request_id=job["request_id"] if job["kind"] == "erase" else None,
        )

    def _take(self, connection: Connection, job: Row, reply: JobReply) -> dict[str, Any]:
        if reply.status != "ok":
            return self._refusal(connection, job, reply)
        attestation = None
        if job["kind"] == "erase":
            attestation = _check_attestation(connection, job, reply.attestation)
        nothing_left = attestation is not None and attestation.new_adapter_digest is None
        if job["kind"] != "ping" and not nothing_left:
            if not reply.sealed:
                return failure("reply_incomplete", "the silo's reply carries no adapter; look into the silo's log")
            if len(reply.sealed) > self._c.settings.max_bundle_bytes:
                return failure("bundle_too_large", f"the sealed adapter has {len(reply.sealed)} bytes, too many")
            digest = attestation.new_adapter_digest if attestation is not None else None
            revisions.stage(connection, self._c.vault, job, reply.sealed, digest)
        return {"state": J.SUCCEEDED, "attestation": reply.attestation if attestation is not None else None}

    def _refusal(self, connection: Connection, job: Row, reply: JobReply) -> dict[str, Any]:
        """What the silo says of its failure is kept only as far as it can hold nothing about a record."""
        if not _CODE.fullmatch(reply.code):
            return failure("silo_error", "the silo reported an error without a readable code")
        message = reply.message if reply.message.isprintable() else ""
        if job["kind"] == "erase":
            subject = self._order(connection, job).subject
            if subject is not None and subject.casefold() in message.casefold():
                message = ""
        return failure(reply.code, message or "the silo reported this error without a sentence")


def _check_attestation(connection: Connection, job: Row, raw: bytes | None) -> ErasureAttestation:
    """Raises AttestationInvalid unless a key of this silo attests to this very request."""
    if not raw:
        raise AttestationInvalid("the silo's reply carries no erasure attestation")
    envelope = Envelope.from_json(raw, MAX_ATTESTATION_BYTES)
    claim = verify_attestation(envelope, signing_keys(connection, job["silo_id"]))
    for name in ("request_id", "silo_id", "plan_id"):
        if getattr(claim, name) != job[name]:
            raise AttestationInvalid(f"the attestation is for {name} {getattr(claim, name)}, expected {job[name]}")
    plan = plans.load(connection, job["plan_id"])
    if (claim.base_model_digest, claim.seed) != (plan.base_model_digest, plan.seed):
        raise AttestationInvalid("the attestation names another base model or seed than the plan")
    return claim
