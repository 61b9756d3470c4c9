"""Job orders from the coordinator to one silo, and the silo's signed attestation of an erasure."""

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import Any

from seqr import dsse
from seqr.canonical import JsonMalformed, canonical_json, parse_json
from seqr.document import Fields, parse_utc
from seqr.errors import SeqrError
from seqr.keys import SigningKey, VerifyKey

JOB_TYPE = "seqr/job/v1"
JOB_PAYLOAD_TYPE = "application/vnd.seqr.job+json"
ERASURE_TYPE = "seqr/erasure/v1"
ERASURE_PAYLOAD_TYPE = "application/vnd.seqr.erasure+json"
JOB_KINDS = ("train", "erase", "ping")
MAX_REVISION = 2**31 - 1
MAX_JOB_BYTES = 64 * 1024
MAX_ERASURE_BYTES = 8 * 1024 * 1024
MAX_COMMITMENTS = 100_000


class JobMalformed(SeqrError):
    """A job order with a missing, unknown or contradictory field."""

    code = "job_malformed"


class JobSignatureInvalid(SeqrError):
    """A job order that the pinned coordinator key did not sign."""

    code = "job_signature_invalid"


class AttestationMalformed(SeqrError):
    """An erasure attestation with a missing, unknown or contradictory field."""

    code = "attestation_malformed"


class AttestationSignatureInvalid(SeqrError):
    """An erasure attestation that no key of the silo signed."""

    code = "attestation_signature_invalid"


@dataclass(frozen=True)
class JobOrder:
    """What one silo is to do. ``revision`` is the number its next adapter carries (0 for a ping); ``nonce`` is used
    once; times as ``seqr.document.utc_text`` writes them. ``subject`` and ``request_id`` belong to erase jobs alone.
    """

    job_id: str
    kind: str
    silo_id: str
    plan_id: str
    revision: int
    nonce: str
    issued_at: str
    expires_at: str
    subject: str | None = None
    request_id: str | None = None

    def expired(self, now: datetime) -> bool:
        """Whether the order may no longer be carried out at ``now`` (aware)."""
        return now >= parse_utc(self.expires_at)

    def to_dict(self) -> dict[str, Any]:
        """The order's JSON object, as signed."""
        return {"type": JOB_TYPE, **asdict(self)}

    @classmethod
    def from_dict(cls, document: Any) -> "JobOrder":
        """Read and check an order's JSON object; raises ``JobMalformed``."""
        order = Fields(document, "the job order", JobMalformed, {f.name for f in fields(cls)} | {"type"})
        order.constant("type", JOB_TYPE)
        kind = order.choice("kind", JOB_KINDS)
        for name in ("subject", "request_id"):
            if order.absent(name) == (kind == "erase"):
                raise order.refuse(name, "given" if kind == "erase" else f"null in a {kind} job")
        issued_at, expires_at = order.time("issued_at"), order.time("expires_at")
        if parse_utc(expires_at) <= parse_utc(issued_at):
            raise order.refuse("expires_at", f"later than issued_at {issued_at}")
        nonce = order.identifier("nonce")
        if len(nonce) < 16:
            raise order.refuse("nonce", "at least 16 characters")
        return cls(
            job_id=order.identifier("job_id"),
            kind=kind,
            silo_id=order.identifier("silo_id"),
            plan_id=order.identifier("plan_id"),
            revision=order.integer("revision", 0 if kind == "ping" else 1, MAX_REVISION),
            nonce=nonce,
            issued_at=issued_at,
            expires_at=expires_at,
            subject=None if order.absent("subject") else order.text("subject"),
            request_id=None if order.absent("request_id") else order.identifier("request_id"),
        )


@dataclass(frozen=True)
class ErasureAttestation:
    """What a silo swears to after an erasure.

    ``removed_commitments`` are HMACs under a salt that never leaves the silo (see ``record_commitment``), so the silo
    can recognize them and nobody else. Dataset roots are Merkle roots (hex) over the silo's salted record digests.
    ``old_adapter_digest`` is None when nothing had been trained; ``new_adapter_digest`` is None when no record is left.
    """

    request_id: str
    silo_id: str
    plan_id: str
    removed_commitments: tuple[str, ...]
    dataset_root_before: str
    dataset_root_after: str
    records_removed: int
    old_adapter_digest: str | None
    new_adapter_digest: str | None
    base_model_digest: str
    seed: int
    environment: dict[str, str]
    completed_at: str

    def to_dict(self) -> dict[str, Any]:
        """The attestation's JSON object, as signed."""
        return {"type": ERASURE_TYPE, **asdict(self), "removed_commitments": list(self.removed_commitments)}

    @classmethod
    def from_dict(cls, document: Any) -> "ErasureAttestation":
        """Read and check an attestation's JSON object; raises ``AttestationMalformed``."""
        names = {f.name for f in fields(cls)} | {"type"}
        claim = Fields(document, "the erasure attestation", AttestationMalformed, names)
        claim.constant("type", ERASURE_TYPE)
        commitments = claim.digests("removed_commitments", MAX_COMMITMENTS)
        removed = claim.integer("records_removed", 1, MAX_COMMITMENTS)
        if len(set(commitments)) != len(commitments) or len(commitments) != removed:
            raise claim.refuse(
                "records_removed", f"the number of distinct removed_commitments, {len(set(commitments))}"
            )
        before, after = claim.digest("dataset_root_before"), claim.digest("dataset_root_after")
        if before == after:
            raise claim.refuse("dataset_root_after", "another root than before, since records were removed")
        return cls(
            request_id=claim.identifier("request_id"),
            silo_id=claim.identifier("silo_id"),
            plan_id=claim.identifier("plan_id"),
            removed_commitments=commitments,
            dataset_root_before=before,
            dataset_root_after=after,
            records_removed=removed,
            old_adapter_digest=None if claim.absent("old_adapter_digest") else claim.digest("old_adapter_digest"),
            new_adapter_digest=None if claim.absent("new_adapter_digest") else claim.digest("new_adapter_digest"),
            base_model_digest=claim.prefixed_digest("base_model_digest"),
            seed=claim.integer("seed", 0, 2**63 - 1),
            environment=claim.text_map("environment"),
            completed_at=claim.time("completed_at"),
        )


def new_nonce() -> str:
    """A fresh job nonce: 128 random bits as hex."""
    return secrets.token_hex(16)


def record_commitment(salt: bytes, record_digest: bytes) -> str:
    """HMAC-SHA256 (hex) of a record's digest under the silo's secret salt: names a record without revealing it."""
    return hmac.new(salt, record_digest, hashlib.sha256).hexdigest()


def sign_job(order: JobOrder, key: SigningKey) -> dsse.Envelope:
    """The order in an envelope signed by the coordinator; raises ``JobMalformed`` rather than sign nonsense."""
    return dsse.sign(JOB_PAYLOAD_TYPE, canonical_json(JobOrder.from_dict(order.to_dict()).to_dict()), key)


def verify_job(envelope: dsse.Envelope, coordinator_key: VerifyKey) -> JobOrder:
    """The order in ``envelope``, if the pinned coordinator key signed it. Expiry and nonce are for the caller to check.

    Raises ``JobSignatureInvalid``, ``JobMalformed`` or ``PayloadTypeMismatch``.
    """
    try:
        payload = dsse.verify(envelope, [coordinator_key], JOB_PAYLOAD_TYPE)
    except dsse.SignatureInvalid as error:
        raise JobSignatureInvalid(f"the job order is not signed by the pinned coordinator key: {error}") from None
    try:
        return JobOrder.from_dict(parse_json(payload, "the job order", MAX_JOB_BYTES))
    except JsonMalformed as error:
        raise JobMalformed(str(error)) from None


def sign_attestation(attestation: ErasureAttestation, key: SigningKey) -> dsse.Envelope:
    """The attestation in an envelope signed by the silo; raises ``AttestationMalformed`` rather than sign nonsense."""
    checked = ErasureAttestation.from_dict(attestation.to_dict())
    return dsse.sign(ERASURE_PAYLOAD_TYPE, canonical_json(checked.to_dict()), key)


def verify_attestation(envelope: dsse.Envelope, silo_keys: Iterable[VerifyKey]) -> ErasureAttestation:
    """The attestation in ``envelope``, if one of the silo's keys signed it.

    Raises ``AttestationSignatureInvalid``, ``AttestationMalformed`` or ``PayloadTypeMismatch``.
    """
    try:
        payload = dsse.verify(envelope, silo_keys, ERASURE_PAYLOAD_TYPE)
    except dsse.SignatureInvalid as error:
        raise AttestationSignatureInvalid(f"the erasure attestation is not signed by the silo: {error}") from None
    try:
        return ErasureAttestation.from_dict(parse_json(payload, "the erasure attestation", MAX_ERASURE_BYTES))
    except JsonMalformed as error:
        raise AttestationMalformed(str(error)) from None
