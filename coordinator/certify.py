"""The last step of a deletion: the receipt, built from what the registry, the silo and the gateways have sworn to."""

from collections.abc import Sequence
from importlib.metadata import version

from sqlalchemy import Connection, insert, select

from coordinator import outbox, plans, purging, revisions
from coordinator.core import Coordinator
from coordinator.db import Row, now
from coordinator.jobs import MAX_ATTESTATION_BYTES
from coordinator.models import receipts
from coordinator.silos import all_signing_keys
from policy import audit
from policy.transaction import named_database_errors
from seqr import dsse
from seqr.canonical import parse_json
from seqr.document import utc_text
from seqr.job import MAX_ERASURE_BYTES, ErasureAttestation
from seqr.keys import VerifyKey
from seqr.receipt import MAX_PURGES, Receipt, RevisionRef, sign_receipt, verify_receipt

MAX_RECEIPT_BYTES = 32 * 1024 * 1024


def attested(envelope: bytes) -> ErasureAttestation:
    """What a stored attestation says; its signature was checked when it came in."""
    payload = dsse.Envelope.from_json(bytes(envelope), MAX_ATTESTATION_BYTES).payload
    return ErasureAttestation.from_dict(parse_json(payload, "the attestation", MAX_ERASURE_BYTES))


def issue_receipt(c: Coordinator, connection: Connection, row: Row, below: int) -> None:
    """Sign the receipt of a purged request and store it, once, in the caller's transaction.

    It is checked as an outsider would check it before it is kept. Raises ReceiptInconsistent when the parts do not fit.
    """
    stored = select(receipts.c.request_id).where(receipts.c.request_id == row["request_id"])
    if connection.execute(stored).first() is not None:
        return
    claim = attested(row["attestation"])
    older = _trained_with(revisions.below(connection, row["silo_id"], below), claim)[-MAX_PURGES:]
    old = _served(older, claim.old_adapter_digest)
    # The gateways that served the old adapter are those of the plan it was trained under.
    home = plans.load(connection, old["plan_id"] if old else claim.plan_id)
    gateways = {key.key_id: VerifyKey.from_b64(key.signing_key) for key in home.gateway_keys}
    receipt = Receipt(
        request_id=row["request_id"],
        silo_id=row["silo_id"],
        plan_id=claim.plan_id,
        subject_commitment=row["subject_hash"],
        requested_at=utc_text(row["received_at"]),
        quarantined_at=utc_text(row["quarantined_at"]),
        issued_at=utc_text(now()),
        old_revision=_ref(old) if old else None,
        new_revision=_new_revision(connection, row["revision_id"]),
        destroyed=tuple(_ref(one) for one in older),
        gateways=tuple(gateways),
        erasure=dsse.Envelope.from_json(bytes(row["attestation"]), MAX_ATTESTATION_BYTES),
        purges=_purges(connection, older, frozenset(gateways)),
        audit_head=_audit_head(c),
        versions={"seqr": version("seqr")},
    )
    envelope = sign_receipt(receipt, c.key)
    verify_receipt(envelope, c.key.public, all_signing_keys(connection, row["silo_id"]), gateways.values())
    values = {"request_id": row["request_id"], "envelope": envelope.to_json(), "issued_at": now()}
    connection.execute(insert(receipts).values(values))
    detail = {"request_id": row["request_id"], "silo_id": row["silo_id"]}
    outbox.record(connection, outbox.COORDINATOR, "deletion.receipt", detail, "the deletion is complete")


def _trained_with(older: Sequence[Row], claim: ErasureAttestation) -> list[Row]:
    """The older revisions whose adapter may hold the records.

    One that equals the new adapter was trained without them (by an earlier attempt, or for another request), unless the
    records changed nothing at all.
    """
    unchanged = claim.old_adapter_digest == claim.new_adapter_digest
    known = [one for one in older if one["adapter_digest"] is not None]
    return [one for one in known if unchanged or one["adapter_digest"] != claim.new_adapter_digest]


def _served(older: Sequence[Row], digest: str | None) -> Row | None:
    """The newest destroyed revision with the adapter that the silo says its erasure replaced."""
    return next((one for one in reversed(older) if digest is not None and one["adapter_digest"] == digest), None)


def _new_revision(connection: Connection, revision_id: str | None) -> RevisionRef | None:
    return None if revision_id is None else _ref(revisions.get(connection, revision_id))


def _ref(row: Row) -> RevisionRef:
    return RevisionRef(row["revision_id"], row["revision"], row["adapter_digest"])


def _purges(connection: Connection, older: Sequence[Row], gateways: frozenset[str]) -> tuple[dsse.Envelope, ...]:
    """The newest acknowledgements by these gateways, as many as a receipt may carry."""
    found = [
        dsse.Envelope.from_json(envelope)
        for one in older
        for gateway, envelope in purging.purge_envelopes(connection, one["revision_id"])
        if gateway in gateways
    ]
    return tuple(found[-MAX_PURGES:])


def _audit_head(c: Coordinator) -> str:
    with named_database_errors(), c.policy_engine.connect() as connection:
        return audit.head(connection).hash
