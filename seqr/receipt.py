"""The receipt: the coordinator's signed statement that a deletion request has been carried out, with the silo's erasure
attestation and the gateways' purge acknowledgements inside, so that it can be checked with public keys alone.
"""

import itertools
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from seqr import dsse
from seqr.canonical import JsonMalformed, canonical_json, parse_json
from seqr.document import Fields, is_identifier, parse_utc
from seqr.errors import SeqrError
from seqr.job import MAX_REVISION, ErasureAttestation, verify_attestation
from seqr.keys import SigningKey, VerifyKey
from seqr.purge import (
    PURGE_PAYLOAD_TYPE,
    PurgeAcknowledgement,
    PurgeMalformed,
    PurgeSignatureInvalid,
    sign_purge,
    verify_purge,
)

__all__ = [
    "DOES_NOT_PROVE",
    "MAX_RECEIPT_FILE_BYTES",
    "PURGE_PAYLOAD_TYPE",
    "PurgeAcknowledgement",
    "PurgeMalformed",
    "PurgeSignatureInvalid",
    "Receipt",
    "ReceiptInconsistent",
    "ReceiptMalformed",
    "ReceiptReport",
    "ReceiptSignatureInvalid",
    "RevisionRef",
    "read_unverified",
    "sign_purge",
    "sign_receipt",
    "verify_purge",
    "verify_receipt",
]

RECEIPT_TYPE = "seqr/receipt/v1"
RECEIPT_PAYLOAD_TYPE = "application/vnd.seqr.receipt+json"
MAX_RECEIPT_BYTES = 16 * 1024 * 1024
MAX_RECEIPT_FILE_BYTES = 2 * MAX_RECEIPT_BYTES  # the envelope carries the receipt as base64
MAX_PURGES = 256
DOES_NOT_PROVE = (
    "that the silo keeps no copy of the records elsewhere: the removal is the silo's own signed word",
    "that the person's data was in no other record, under another subject or at another silo",
    "that answers given before the quarantine are forgotten by those who received them",
    "that a gateway's or coordinator's host did not copy memory or disks: each signs for its own software only",
)


class ReceiptMalformed(SeqrError):
    """A receipt with a missing, unknown or impossible field."""

    code = "receipt_malformed"


class ReceiptSignatureInvalid(SeqrError):
    """A receipt that the given coordinator key did not sign."""

    code = "receipt_signature_invalid"


class ReceiptInconsistent(SeqrError):
    """A receipt whose parts are genuine but do not belong together."""

    code = "receipt_inconsistent"


@dataclass(frozen=True)
class RevisionRef:
    """One revision: its id at the coordinator, its number and its adapter's digest."""

    revision_id: str
    revision: int
    adapter_digest: str


@dataclass(frozen=True)
class Receipt:
    """The statement.

    ``subject_commitment`` is a salted hash (hex) of the person's identifier; ``old_revision`` the one in service when
    the request came (None: the silo had none), ``new_revision`` its successor (None: no record is left); ``destroyed``
    every revision trained with the records; ``gateways`` the key ids of the plan's gateways; ``audit_head`` the hash of
    the audit log's last row.
    """

    request_id: str
    silo_id: str
    plan_id: str
    subject_commitment: str
    requested_at: str
    quarantined_at: str
    issued_at: str
    old_revision: RevisionRef | None
    new_revision: RevisionRef | None
    destroyed: tuple[RevisionRef, ...]
    gateways: tuple[str, ...]
    erasure: dsse.Envelope
    purges: tuple[dsse.Envelope, ...]
    audit_head: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    does_not_prove: tuple[str, ...] = DOES_NOT_PROVE

    def to_dict(self) -> dict[str, Any]:
        """The receipt's JSON object, as signed."""
        document = {f.name: getattr(self, f.name) for f in fields(self)}
        document |= {
            "type": RECEIPT_TYPE,
            "old_revision": asdict(self.old_revision) if self.old_revision else None,
            "new_revision": asdict(self.new_revision) if self.new_revision else None,
            "destroyed": [asdict(revision) for revision in self.destroyed],
            "gateways": list(self.gateways),
            "erasure": self.erasure.to_dict(),
            "purges": [purge.to_dict() for purge in self.purges],
            "does_not_prove": list(self.does_not_prove),
        }
        return document

    @classmethod
    def from_dict(cls, document: Any) -> "Receipt":
        """Read and check a receipt's JSON object; raises ``ReceiptMalformed``."""
        receipt = Fields(document, "the receipt", ReceiptMalformed, {f.name for f in fields(cls)} | {"type"})
        receipt.constant("type", RECEIPT_TYPE)
        try:
            erasure = dsse.Envelope.from_dict(receipt.raw("erasure"))
            purges = tuple(dsse.Envelope.from_dict(item) for item in receipt.items("purges", MAX_PURGES))
        except dsse.EnvelopeMalformed as error:
            raise ReceiptMalformed(f"the receipt: an embedded statement is unreadable: {error}") from None
        gateways = tuple(receipt.items("gateways", MAX_PURGES))
        if not all(is_identifier(key_id) for key_id in gateways) or len(set(gateways)) != len(gateways):
            raise receipt.refuse("gateways", "a list of distinct key ids")
        return cls(
            request_id=receipt.identifier("request_id"),
            silo_id=receipt.identifier("silo_id"),
            plan_id=receipt.identifier("plan_id"),
            subject_commitment=receipt.digest("subject_commitment"),
            requested_at=receipt.time("requested_at"),
            quarantined_at=receipt.time("quarantined_at"),
            issued_at=receipt.time("issued_at"),
            old_revision=None if receipt.absent("old_revision") else _read_revision(receipt.raw("old_revision")),
            new_revision=None if receipt.absent("new_revision") else _read_revision(receipt.raw("new_revision")),
            destroyed=tuple(_read_revision(item) for item in receipt.items("destroyed", MAX_PURGES)),
            gateways=gateways,
            erasure=erasure,
            purges=purges,
            audit_head=None if receipt.absent("audit_head") else receipt.digest("audit_head"),
            versions=receipt.text_map("versions"),
            does_not_prove=receipt.texts("does_not_prove", 32),
        )


@dataclass(frozen=True)
class ReceiptReport:
    """A receipt that verified: the statement, what was inside it, and one sentence per fact that was checked."""

    receipt: Receipt
    attestation: ErasureAttestation
    purges: tuple[PurgeAcknowledgement, ...]
    verified: tuple[str, ...]


def sign_receipt(receipt: Receipt, key: SigningKey) -> dsse.Envelope:
    """The receipt in an envelope signed by the coordinator; raises ``ReceiptMalformed`` rather than sign nonsense."""
    return dsse.sign(RECEIPT_PAYLOAD_TYPE, canonical_json(Receipt.from_dict(receipt.to_dict()).to_dict()), key)


def verify_receipt(
    envelope: dsse.Envelope,
    coordinator_key: VerifyKey,
    silo_keys: Iterable[VerifyKey],
    gateway_keys: Iterable[VerifyKey],
) -> ReceiptReport:
    """Check every signature in the receipt and that all parts speak of the same deletion.

    Raises ``ReceiptSignatureInvalid``, ``AttestationSignatureInvalid``, ``PurgeSignatureInvalid``,
    ``ReceiptInconsistent``, or the ``...Malformed`` error of the part that cannot be read.
    """
    try:
        payload = dsse.verify(envelope, [coordinator_key], RECEIPT_PAYLOAD_TYPE)
    except dsse.SignatureInvalid as error:
        raise ReceiptSignatureInvalid(f"the receipt is not signed by the coordinator key given: {error}") from None
    receipt = _parse(payload)
    attestation = verify_attestation(receipt.erasure, silo_keys)
    purges = _verify_purges(receipt, tuple(gateway_keys))
    _check_statement(receipt, unchanged=attestation.old_adapter_digest == attestation.new_adapter_digest)
    _check_attestation(receipt, attestation)
    _check_purges(receipt, purges)
    return ReceiptReport(receipt, attestation, purges, _sentences(receipt, attestation, purges))


def read_unverified(envelope: dsse.Envelope) -> Receipt:
    """The receipt in ``envelope`` without checking who signed it, for display only; raises ``ReceiptMalformed``."""
    return _parse(envelope.payload)


def _parse(payload: bytes) -> Receipt:
    try:
        return Receipt.from_dict(parse_json(payload, "the receipt", MAX_RECEIPT_BYTES))
    except JsonMalformed as error:
        raise ReceiptMalformed(str(error)) from None


def _read_revision(value: Any) -> RevisionRef:
    names = ("revision_id", "revision", "adapter_digest")
    revision = Fields(value, "a revision in the receipt", ReceiptMalformed, names)
    return RevisionRef(
        revision.identifier("revision_id"),
        revision.integer("revision", 1, MAX_REVISION),
        revision.digest("adapter_digest"),
    )


def _verify_purges(receipt: Receipt, keys: tuple[VerifyKey, ...]) -> tuple[PurgeAcknowledgement, ...]:
    purges = tuple(verify_purge(envelope, keys) for envelope in receipt.purges)
    # One gateway must not acknowledge in the name of another.
    names: dict[VerifyKey, str] = {}
    for purge, envelope in zip(purges, receipt.purges, strict=True):
        for key in dsse.signers(envelope, keys):
            if names.setdefault(key, purge.gateway_key_id) != purge.gateway_key_id:
                raise ReceiptInconsistent(
                    f"one key signed the purges of two gateways, {names[key]} and {purge.gateway_key_id}"
                )
    return purges


def _check_statement(receipt: Receipt, unchanged: bool) -> None:
    """``unchanged``: the silo attests that training without the records gave the same bytes (they were beyond the
    plan's training limits), so that old and new adapter may be one.
    """
    moments = [("requested_at", receipt.requested_at), ("quarantined_at", receipt.quarantined_at)]
    moments.append(("issued_at", receipt.issued_at))
    for (earlier, first), (later, second) in itertools.pairwise(moments):
        if parse_utc(second) < parse_utc(first):
            raise ReceiptInconsistent(f"the receipt: {later} {second} is before {earlier} {first}")
    ids = [revision.revision_id for revision in receipt.destroyed]
    if len(set(ids)) != len(ids):
        raise ReceiptInconsistent("the receipt names a destroyed revision twice")
    if receipt.old_revision is not None and receipt.old_revision not in receipt.destroyed:
        raise ReceiptInconsistent(f"old revision {receipt.old_revision.revision_id} is not among those destroyed")
    new = receipt.new_revision
    if new is None:
        return
    for old in receipt.destroyed:
        same = new.adapter_digest == old.adapter_digest and not unchanged
        if same or new.revision_id == old.revision_id:
            raise ReceiptInconsistent(f"the new revision {new.revision_id} is one of those destroyed")
        if new.revision <= old.revision:
            raise ReceiptInconsistent(f"new revision number {new.revision} is not above the old one {old.revision}")


def _check_attestation(receipt: Receipt, attestation: ErasureAttestation) -> None:
    old = receipt.old_revision.adapter_digest if receipt.old_revision else None
    new = receipt.new_revision.adapter_digest if receipt.new_revision else None
    for name, said, expected in (
        ("request_id", attestation.request_id, receipt.request_id),
        ("silo_id", attestation.silo_id, receipt.silo_id),
        ("plan_id", attestation.plan_id, receipt.plan_id),
        ("old_adapter_digest", attestation.old_adapter_digest, old),
        ("new_adapter_digest", attestation.new_adapter_digest, new),
    ):
        if said != expected:
            raise ReceiptInconsistent(
                f"the silo attests {name} {said or 'none'}, the coordinator's statement says {expected or 'none'}"
            )


def _check_purges(receipt: Receipt, purges: tuple[PurgeAcknowledgement, ...]) -> None:
    destroyed = {revision.revision_id: revision for revision in receipt.destroyed}
    for purge in purges:
        revision = destroyed.get(purge.revision_id)
        if revision is None:
            raise ReceiptInconsistent(
                f"gateway {purge.gateway_key_id} purged {purge.revision_id}, not a revision named"
            )
        if purge.silo_id != receipt.silo_id:
            raise ReceiptInconsistent(
                f"gateway {purge.gateway_key_id} purged silo {purge.silo_id}, not {receipt.silo_id}"
            )
        if purge.adapter_digest != revision.adapter_digest:
            raise ReceiptInconsistent(
                f"gateway {purge.gateway_key_id} purged adapter {purge.adapter_digest}, "
                f"revision {revision.revision_id} is {revision.adapter_digest}"
            )
        if purge.gateway_key_id not in receipt.gateways:
            raise ReceiptInconsistent(f"gateway {purge.gateway_key_id} is not one of the plan's gateways")
    if receipt.old_revision is None:
        return
    acknowledged = {purge.gateway_key_id for purge in purges if purge.revision_id == receipt.old_revision.revision_id}
    silent = sorted(set(receipt.gateways) - acknowledged)
    if silent or not acknowledged:
        raise ReceiptInconsistent(
            f"no purge acknowledgement for revision {receipt.old_revision.revision_id} by gateway "
            f"{', '.join(silent) or '(none named)'}"
        )


def _sentences(
    receipt: Receipt, attestation: ErasureAttestation, purges: tuple[PurgeAcknowledgement, ...]
) -> tuple[str, ...]:
    lines = [
        f"coordinator signed: request {receipt.request_id} at silo {receipt.silo_id}, received {receipt.requested_at}",
        f"silo out of routing since {receipt.quarantined_at}",
        f"silo signed: {attestation.records_removed} records removed, dataset root "
        f"{attestation.dataset_root_before[:16]}… -> {attestation.dataset_root_after[:16]}…",
    ]
    lines += [
        f"gateway {purge.gateway_key_id} signed: revision {purge.revision_id} gone from {', '.join(purge.where)} "
        f"since {purge.purged_at}"
        for purge in purges
    ]
    old = receipt.old_revision.adapter_digest[:16] + "…" if receipt.old_revision else "none"
    new = receipt.new_revision.adapter_digest[:16] + "…" if receipt.new_revision else "none, no record is left"
    if receipt.old_revision and attestation.old_adapter_digest == attestation.new_adapter_digest:
        lines.append("the silo signed: training without the records gives the same adapter, it never depended on them")
    lines.append(f"adapter {old} -> {new}; all parts name the same request, silo, plan and adapters")
    return tuple(lines)
