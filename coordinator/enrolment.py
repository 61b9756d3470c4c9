"""Enrolment: how an owner asks to join, and how an admin lets a silo in.

Anyone may ask, so asking changes nothing but a bounded list. What an admin approves is a fingerprint that the owner has
read out over another channel; the keys behind it are the ones that count.
"""

import re
import secrets
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection, Engine, delete, func, insert, select, update

from coordinator import outbox
from coordinator.db import Row, now, writing
from coordinator.errors import (
    Conflict,
    EnrolmentProofInvalid,
    EnrolmentQueueFull,
    FingerprintMismatch,
    KeyInUse,
    SigningKeyInvalid,
    SiloAlreadyEnrolled,
    SiloIdInvalid,
    SiloUnknown,
)
from coordinator.flower_nodes import canonical_node_key
from coordinator.models import enrolments, silo_keys, silos
from coordinator.silos import fingerprints
from seqr.dsse import Envelope
from seqr.enrolment import MAX_ENROLMENT_BYTES, SILO_ID, EnrolmentClaim, verify_enrolment
from seqr.errors import SeqrError
from seqr.keys import VerifyKey

MAX_DISPLAY_NAME = 200
PENDING_PER_SILO = 5
PENDING_LIFETIME = timedelta(days=30)


@dataclass(frozen=True)
class Enrolment:
    """A request to join: the fields of seqr.enrolment.EnrolmentClaim, and ``proof``, the envelope that signs them."""

    silo_id: str
    display_name: str
    signing_key: str
    node_key: str
    proof: bytes


def enrol(engine: Engine, request: Enrolment, max_pending: int) -> dict[str, Any]:
    """Put a request on the list of those an admin may approve; asking again with the same keys changes nothing.

    Raises SiloIdInvalid, SigningKeyInvalid, NodeKeyInvalid, EnrolmentProofInvalid, SiloAlreadyEnrolled, KeyInUse,
    EnrolmentQueueFull.
    """
    key, node_key = _check(request)
    with writing(engine) as connection:
        silo = connection.execute(select(silos.c.status).where(silos.c.silo_id == request.silo_id)).scalar()
        if silo == "approved":
            raise SiloAlreadyEnrolled(
                f"silo {request.silo_id} is enrolled already; choose another id, or to enrol with new keys, ask the "
                "admin to suspend it first"
            )
        _require_unused(connection, request.silo_id, key, node_key)
        stale = (enrolments.c.state == "pending", enrolments.c.created_at < now() - PENDING_LIFETIME)
        connection.execute(delete(enrolments).where(*stale))
        same = select(enrolments).where(
            enrolments.c.silo_id == request.silo_id,
            enrolments.c.signing_key == request.signing_key,
            enrolments.c.node_key == node_key,
            enrolments.c.state == "pending",
        )
        row: Row | None = connection.execute(same).mappings().first()
        if row is None:
            _require_room(connection, request.silo_id, max_pending)
            row = {
                "enrolment_id": "enr-" + secrets.token_hex(8),
                "silo_id": request.silo_id,
                "display_name": request.display_name,
                "signing_key": request.signing_key,
                "node_key": node_key,
                "fingerprint": key.fingerprint,
                "state": "pending",
                "created_at": now(),
            }
            connection.execute(insert(enrolments).values(row))
        return {name: row[name] for name in ("enrolment_id", "silo_id", "fingerprint", "state")}


def approve(engine: Engine, silo_id: str, fingerprint: str, actor: str, reason: str) -> None:
    """Let the silo in whose owner read out ``fingerprint``; policy and SuperLink hear of it from ``Reconciler``.

    A suspended silo comes back with its present key or with a newly enrolled one. Raises SiloUnknown,
    FingerprintMismatch, SiloAlreadyEnrolled, KeyInUse.
    """
    with writing(engine) as connection:
        silo = connection.execute(select(silos).where(silos.c.silo_id == silo_id).with_for_update()).mappings().first()
        if silo is not None and silo["status"] == "approved":
            raise SiloAlreadyEnrolled(f"silo {silo_id} is approved already")
        wanted = fingerprint.strip()
        pending = _pending(connection, silo_id)
        chosen = next((row for row in pending if row["fingerprint"] == wanted), None)
        if chosen is None and silo is not None and wanted in fingerprints(connection, silo_id):
            values = {"status": "approved", "policy_synced": False, "node_synced": False}
            connection.execute(update(silos).where(silos.c.silo_id == silo_id).values(values))
        elif chosen is not None:
            _admit(connection, chosen, silo is not None, actor, reason)
        elif pending or silo is not None:
            raise FingerprintMismatch(
                f"no request of silo {silo_id} has this fingerprint; compare it with what the owner's "
                "`seqr silo enrol` printed, and do not approve a key nobody has read out to you"
            )
        else:
            raise SiloUnknown(f"no silo {silo_id!r:.80} has asked to enrol")
        detail = {"silo_id": silo_id, "fingerprint": wanted}
        outbox.record(connection, actor, "silo.approved", detail, reason)


def reject(engine: Engine, silo_id: str, actor: str, reason: str, fingerprint: str | None = None) -> int:
    """Refuse the silo's pending requests, or the one with ``fingerprint``; returns how many. Raises SiloUnknown."""
    with writing(engine) as connection:
        chosen = [row for row in _pending(connection, silo_id) if fingerprint in (None, row["fingerprint"])]
        if not chosen:
            raise SiloUnknown(f"no request of a silo {silo_id!r:.80} is waiting for a decision")
        for row in chosen:
            _decide(connection, row, "rejected", actor, reason)
            detail = {"silo_id": silo_id, "fingerprint": row["fingerprint"]}
            outbox.record(connection, actor, "silo.rejected", detail, reason)
        return len(chosen)


def _check(request: Enrolment) -> tuple[VerifyKey, str]:
    if not re.fullmatch(SILO_ID, request.silo_id):
        raise SiloIdInvalid("a silo id is 1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit")
    if len(request.display_name) > MAX_DISPLAY_NAME or not request.display_name.isprintable():
        raise SiloIdInvalid(f"the display name must be at most {MAX_DISPLAY_NAME} printable characters")
    try:
        key = VerifyKey.from_b64(request.signing_key)
    except SeqrError as error:
        raise SigningKeyInvalid(f"the signing key is unusable: {error}") from None
    node_key = canonical_node_key(request.node_key)
    asked = EnrolmentClaim(request.silo_id, request.display_name, request.signing_key, request.node_key)
    try:
        proven = verify_enrolment(Envelope.from_json(request.proof, MAX_ENROLMENT_BYTES), key)
    except SeqrError as error:
        raise EnrolmentProofInvalid(f"the request is not signed by the key it names: {error}") from None
    if proven != asked:
        raise EnrolmentProofInvalid("the signed proof does not say what the request says; run `seqr silo enrol` again")
    return key, node_key


def _require_unused(connection: Connection, silo_id: str, key: VerifyKey, node_key: str) -> None:
    """One key, one silo: otherwise a bundle or a connection could be taken for another silo's."""
    for kind, text in (("signing", key.to_b64()), ("node", node_key)):
        query = select(silo_keys.c.silo_id).where(silo_keys.c.kind == kind, silo_keys.c.public_key == text)
        owner = connection.execute(query).scalar()
        if owner is not None and owner != silo_id:
            raise KeyInUse(f"this {kind} key is another silo's; `seqr silo init` in a new directory makes new keys")


def _require_room(connection: Connection, silo_id: str, max_pending: int) -> None:
    pending = select(func.count()).select_from(enrolments).where(enrolments.c.state == "pending")
    of_silo = connection.execute(pending.where(enrolments.c.silo_id == silo_id)).scalar_one()
    if of_silo >= PENDING_PER_SILO or connection.execute(pending).scalar_one() >= max_pending:
        raise EnrolmentQueueFull("too many requests are waiting for a decision; ask the admin to decide and try again")


def _pending(connection: Connection, silo_id: str) -> list[Row]:
    query = select(enrolments).where(enrolments.c.silo_id == silo_id, enrolments.c.state == "pending")
    return list(connection.execute(query.order_by(enrolments.c.created_at)).mappings())


def _admit(connection: Connection, row: Row, known: bool, actor: str, reason: str) -> None:
    silo_id, moment = row["silo_id"], now()
    _require_unused(connection, silo_id, VerifyKey.from_b64(row["signing_key"]), row["node_key"])
    values = {
        "display_name": row["display_name"],
        "status": "approved",
        "approved_at": moment,
        "approved_by": actor,
        "policy_synced": False,
        "node_synced": False,
    }
    if known:
        connection.execute(update(silos).where(silos.c.silo_id == silo_id).values(values))
        retired = update(silo_keys).where(silo_keys.c.silo_id == silo_id, silo_keys.c.retired_at.is_(None))
        connection.execute(retired.values(retired_at=moment))
    else:
        connection.execute(insert(silos).values(silo_id=silo_id, **values))
    for kind, text in (("signing", row["signing_key"]), ("node", row["node_key"])):
        mine = select(silo_keys.c.silo_id).where(silo_keys.c.kind == kind, silo_keys.c.public_key == text)
        if connection.execute(mine).first() is None:
            key = {"kind": kind, "public_key": text, "silo_id": silo_id, "added_at": moment}
            connection.execute(insert(silo_keys).values(key))
        else:
            again = update(silo_keys).where(silo_keys.c.kind == kind, silo_keys.c.public_key == text)
            connection.execute(again.values(retired_at=None))
    _decide(connection, row, "approved", actor, reason)
    for other in _pending(connection, silo_id):
        _decide(connection, other, "rejected", actor, "another request of this silo was approved")


def _decide(connection: Connection, row: Row, state: str, actor: str, reason: str) -> None:
    values = {"state": state, "decided_at": now(), "decided_by": actor, "reason": reason}
    decided = update(enrolments).where(
        enrolments.c.enrolment_id == row["enrolment_id"], enrolments.c.state == "pending"
    )
    if connection.execute(decided.values(values)).rowcount != 1:
        raise Conflict(f"the request of silo {row['silo_id']} has been decided meanwhile")
