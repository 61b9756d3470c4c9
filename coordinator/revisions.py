"""Revisions: every adapter a silo has handed in, from staged to destroyed. Nothing ever comes back.

A function that takes a connection belongs to its caller's transaction; the others make their own and may be repeated.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, insert, select, update

from coordinator import outbox
from coordinator.core import Coordinator
from coordinator.db import Row, now, reading, writing
from coordinator.errors import (
    AdapterTombstoned,
    AttestationMismatch,
    Conflict,
    DigestInvalid,
    IllegalTransition,
    RevisionSuperseded,
    RevisionUnknown,
)
from coordinator.models import jobs, revisions, tombstones
from coordinator.silos import require_silo, signing_keys
from coordinator.vault import Vault
from seqr.canonical import is_sha256_hex

_MAX_MESSAGE = 300


class RevisionState(StrEnum):
    STAGED = "staged"
    ADMITTED = "admitted"
    ACTIVE = "active"
    RETIRED = "retired"
    QUARANTINED = "quarantined"
    DESTROYED = "destroyed"


R = RevisionState

TRANSITIONS: dict[RevisionState, frozenset[RevisionState]] = {
    R.STAGED: frozenset({R.ADMITTED, R.QUARANTINED, R.RETIRED, R.DESTROYED}),
    R.ADMITTED: frozenset({R.ACTIVE, R.QUARANTINED}),
    R.ACTIVE: frozenset({R.RETIRED, R.QUARANTINED}),
    R.RETIRED: frozenset({R.DESTROYED}),
    # Retired without having been in use: gateways are to swear that nothing of what they looked at is left.
    R.QUARANTINED: frozenset({R.RETIRED, R.DESTROYED}),
    R.DESTROYED: frozenset(),
}
# What a gateway has to know of: what to check, what to serve, what to drop.
FOR_GATEWAYS = (R.STAGED, R.ACTIVE, R.RETIRED)


def stage(connection: Connection, vault: Vault, job: Row, sealed: bytes, adapter_digest: str | None) -> str:
    """Take a job's sealed adapter into the vault and the registry; returns the revision's id.

    ``adapter_digest`` is what the silo has attested, if it had to; otherwise intake finds it out. The id follows
    from the job's, so an attempt that was cut short is overwritten by the next, not doubled.
    """
    revision_id = "rev-" + str(job["job_id"]).removeprefix("job-")
    digest = vault.put(revision_id, sealed, job["silo_id"], job["plan_id"], job["revision"])
    moment = now()
    row = {
        "revision_id": revision_id,
        "silo_id": job["silo_id"],
        "plan_id": job["plan_id"],
        "revision": job["revision"],
        "job_id": job["job_id"],
        "job_nonce": job["nonce"],
        "state": R.STAGED,
        "sealed_sha256": digest,
        "sealed_bytes": len(sealed),
        "adapter_digest": adapter_digest,
        "created_at": moment,
        "changed_at": moment,
    }
    connection.execute(insert(revisions).values(row))
    _note(connection, outbox.COORDINATOR, {**row, "from": None}, R.STAGED, "the silo handed in a sealed adapter")
    return revision_id


def admit(c: Coordinator, revision_id: str, adapter_digest: str, actor: str) -> list[str]:
    """A gateway found the revision sound: it becomes active and its predecessor retires, in one transaction.

    Returns the ids of the silo's retired revisions, which the gateway is to purge. Saying it again changes nothing.
    Raises DigestInvalid, RevisionUnknown, IllegalTransition, RevisionSuperseded, AdapterTombstoned,
    AttestationMismatch.
    """
    if not is_sha256_hex(adapter_digest):
        raise DigestInvalid("adapter_digest must be a SHA-256 of 64 lower-case hex digits")
    refusal: Conflict | None = None
    with writing(c.engine) as connection:
        row = locked(connection, revision_id)
        silo_id = row["silo_id"]
        if row["state"] != R.ACTIVE or row["adapter_digest"] != adapter_digest:
            _require(row, R.ADMITTED)
            job = connection.execute(select(jobs).where(jobs.c.job_id == row["job_id"])).mappings().one()
            refusal = _refusal(connection, row, job, adapter_digest)
            if refusal is not None:
                values = {"code": refusal.code, "message": str(refusal)[:_MAX_MESSAGE]}
                _change(connection, row, R.QUARANTINED, actor, "refused at admission", values)
            else:
                _change(connection, row, R.ADMITTED, actor, "passed intake", {"adapter_digest": adapter_digest})
                others = [revisions.c.silo_id == silo_id, revisions.c.state == R.ACTIVE]
                if job["request_id"] is None:
                    others.append(revisions.c.plan_id == row["plan_id"])
                for other in connection.execute(select(revisions).where(*others)).mappings().all():
                    _change(connection, other, R.RETIRED, actor, "a newer revision took its place")
                _change(connection, {**row, "state": R.ADMITTED}, R.ACTIVE, actor, "passed intake")
        retired = select(revisions.c.revision_id).where(revisions.c.silo_id == silo_id, revisions.c.state == R.RETIRED)
        ids = list(connection.execute(retired.order_by(revisions.c.revision)).scalars())
    if refusal is not None:
        raise refusal
    return ids


def quarantine(c: Coordinator, revision_id: str, code: str, message: str, actor: str) -> None:
    """A gateway refused the revision. Saying it again changes nothing. Raises RevisionUnknown, IllegalTransition."""
    with writing(c.engine) as connection:
        row = locked(connection, revision_id)
        if row["state"] != R.QUARANTINED:
            values = {"code": code[:64], "message": message[:_MAX_MESSAGE]}
            _change(connection, row, R.QUARANTINED, actor, f"intake refused it: {code[:64]}", values)


def destroy(c: Coordinator, revision_id: str, why: str) -> None:
    """Shred the revision's key and file, then say so. Raises IllegalTransition for one that may still be in use."""
    with reading(c.engine) as connection:
        row = get(connection, revision_id)
    if row["state"] == R.DESTROYED:
        return
    _require(row, R.DESTROYED)
    with writing(c.engine) as connection:
        row = locked(connection, revision_id)
        if row["state"] != R.DESTROYED:
            # Inside the transaction: a staged revision cannot be admitted between the check and the shredding.
            _require(row, R.DESTROYED)
            c.vault.destroy(revision_id)
            _change(connection, row, R.DESTROYED, outbox.COORDINATOR, why)


def retire_below(connection: Connection, silo_id: str, number: int, why: str) -> None:
    """Retire what a gateway may hold of the silo's revisions with a lower number, of whatever plan.

    One that was never admitted and whose digest nobody knows cannot be named in an acknowledgement.
    """
    seen = revisions.c.state.in_((R.STAGED, R.QUARANTINED)) & revisions.c.adapter_digest.is_not(None)
    query = select(revisions).where(
        revisions.c.silo_id == silo_id, revisions.c.revision < number, (revisions.c.state == R.ACTIVE) | seen
    )
    for row in connection.execute(query.with_for_update()).mappings().all():
        _change(connection, row, R.RETIRED, outbox.COORDINATOR, why)


def below(connection: Connection, silo_id: str, number: int) -> list[Row]:
    """The silo's revisions with a lower number, of whatever plan, oldest first."""
    query = select(revisions).where(revisions.c.silo_id == silo_id, revisions.c.revision < number)
    return list(connection.execute(query.order_by(revisions.c.revision)).mappings())


def get(connection: Connection, revision_id: str) -> Row:
    """Raises RevisionUnknown."""
    row = connection.execute(select(revisions).where(revisions.c.revision_id == revision_id)).mappings().first()
    if row is None:
        raise RevisionUnknown(f"there is no revision {revision_id!r:.80}")
    return row


def bundle(c: Coordinator, revision_id: str) -> bytes:
    """The sealed bundle as the silo sent it. Raises RevisionUnknown, BundleDestroyed, BundleCorrupt."""
    with reading(c.engine) as connection:
        row = get(connection, revision_id)
    return c.vault.get(revision_id, row["silo_id"], row["plan_id"], row["revision"], row["sealed_sha256"])


def listing(connection: Connection, silo_id: str | None = None, limit: int = 500) -> list[Row]:
    """Newest first."""
    query = select(revisions).order_by(revisions.c.created_at.desc(), revisions.c.revision_id).limit(limit)
    if silo_id is not None:
        query = query.where(revisions.c.silo_id == silo_id)
    return list(connection.execute(query).mappings())


def for_gateways(connection: Connection) -> list[dict[str, Any]]:
    """What gateways poll: every staged, active and retired revision with what intake has to expect of it."""
    query = select(revisions).where(revisions.c.state.in_(FOR_GATEWAYS))
    found = []
    for row in connection.execute(query.order_by(revisions.c.silo_id, revisions.c.revision)).mappings():
        keys = [key.to_b64() for key in signing_keys(connection, row["silo_id"])]
        buried = tombstoned(connection, row["silo_id"]) - {row["adapter_digest"]}
        found.append(
            {
                **named(row),
                "state": row["state"],
                "sealed_sha256": row["sealed_sha256"],
                "sealed_bytes": row["sealed_bytes"],
                "adapter_digest": row["adapter_digest"],
                "expectation": {
                    "silo_keys": keys,
                    "job_nonce": row["job_nonce"],
                    "revision": row["revision"],
                    "tombstoned_digests": sorted(buried),
                },
            }
        )
    return found


def tombstoned(connection: Connection, silo_id: str) -> set[str]:
    """Digests of the adapters that this silo may never hand in again."""
    query = select(tombstones.c.adapter_digest).where(tombstones.c.silo_id == silo_id)
    return set(connection.execute(query).scalars())


def _refusal(connection: Connection, row: Row, job: Row, digest: str) -> Conflict | None:
    newer = select(revisions.c.revision_id).where(
        revisions.c.silo_id == row["silo_id"],
        revisions.c.revision > row["revision"],
        revisions.c.state.in_((R.ACTIVE, R.RETIRED, R.DESTROYED)),
    )
    if connection.execute(newer.limit(1)).first() is not None:
        return RevisionSuperseded("a newer revision of this silo has been in use already; revisions only go forward")
    if digest in tombstoned(connection, row["silo_id"]):
        return AdapterTombstoned("this adapter was destroyed by a deletion request and may not come back")
    if job["attestation"] is not None and row["adapter_digest"] != digest:
        return AttestationMismatch("the admitted adapter is not the one that the silo's erasure attestation names")
    return None


def locked(connection: Connection, revision_id: str) -> Row:
    """The revision, its silo locked against every other change of the silo's revisions."""
    require_silo(connection, get(connection, revision_id)["silo_id"], lock=True)
    return get(connection, revision_id)


def _require(row: Row, wanted: RevisionState) -> None:
    if wanted not in TRANSITIONS[RevisionState(row["state"])]:
        raise IllegalTransition(f"revision {row['revision_id']}", row["state"], wanted)


def _change(
    connection: Connection,
    row: Row,
    state: RevisionState,
    actor: str,
    reason: str,
    values: Mapping[str, object] | None = None,
) -> None:
    _require(row, state)
    change = update(revisions).where(revisions.c.revision_id == row["revision_id"])
    connection.execute(change.values(state=state, changed_at=now(), **(values or {})))
    _note(connection, actor, {**row, **(values or {}), "from": row["state"]}, state, reason)


def _note(connection: Connection, actor: str, row: Row, state: RevisionState, reason: str) -> None:
    detail = {**named(row), "from": row["from"], "adapter_digest": row.get("adapter_digest")}
    outbox.record(connection, actor, f"revision.{state}", detail, reason)


def named(row: Row) -> dict[str, Any]:
    return {name: row[name] for name in ("revision_id", "silo_id", "plan_id", "revision")}
