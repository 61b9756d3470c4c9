"""A gateway's signed acknowledgement that a destroyed revision has left its memory, disk and caches."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from seqr import dsse
from seqr.canonical import JsonMalformed, canonical_json, parse_json
from seqr.document import Fields
from seqr.errors import SeqrError
from seqr.keys import SigningKey, VerifyKey

PURGE_TYPE = "seqr/purge/v1"
PURGE_PAYLOAD_TYPE = "application/vnd.seqr.purge+json"
MAX_PURGE_BYTES = 64 * 1024
MAX_PLACES = 32


class PurgeMalformed(SeqrError):
    """A purge acknowledgement with a missing, unknown or impossible field."""

    code = "purge_malformed"


class PurgeSignatureInvalid(SeqrError):
    """A purge acknowledgement that no known gateway signed."""

    code = "purge_signature_invalid"


@dataclass(frozen=True)
class PurgeAcknowledgement:
    """What a gateway swears to: ``revision_id`` of ``silo_id`` with ``adapter_digest`` is gone from every place in
    ``where`` since ``purged_at``; ``library_version`` is the first version of its library without it.
    """

    revision_id: str
    silo_id: str
    adapter_digest: str
    gateway_key_id: str
    library_version: int
    purged_at: str
    where: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The acknowledgement's JSON object, as signed."""
        return {"type": PURGE_TYPE, **asdict(self), "where": list(self.where)}

    @classmethod
    def from_dict(cls, document: Any) -> "PurgeAcknowledgement":
        """Read and check an acknowledgement's JSON object; raises ``PurgeMalformed``."""
        claim = Fields(document, "the purge acknowledgement", PurgeMalformed, {f.name for f in fields(cls)} | {"type"})
        claim.constant("type", PURGE_TYPE)
        return cls(
            revision_id=claim.identifier("revision_id"),
            silo_id=claim.identifier("silo_id"),
            adapter_digest=claim.digest("adapter_digest"),
            gateway_key_id=claim.identifier("gateway_key_id"),
            library_version=claim.integer("library_version", 0, 2**53),
            purged_at=claim.time("purged_at"),
            where=claim.texts("where", MAX_PLACES),
        )


def sign_purge(acknowledgement: PurgeAcknowledgement, key: SigningKey) -> dsse.Envelope:
    """The acknowledgement in an envelope signed by the gateway; raises ``PurgeMalformed`` rather than sign nonsense."""
    checked = PurgeAcknowledgement.from_dict(acknowledgement.to_dict())
    return dsse.sign(PURGE_PAYLOAD_TYPE, canonical_json(checked.to_dict()), key)


def verify_purge(envelope: dsse.Envelope, gateway_keys: Iterable[VerifyKey]) -> PurgeAcknowledgement:
    """The acknowledgement in ``envelope``, if one of ``gateway_keys`` signed it.

    Raises ``PurgeSignatureInvalid``, ``PurgeMalformed`` or ``PayloadTypeMismatch``.
    """
    try:
        payload = dsse.verify(envelope, gateway_keys, PURGE_PAYLOAD_TYPE)
    except dsse.SignatureInvalid as error:
        raise PurgeSignatureInvalid(f"the purge acknowledgement is not signed by a known gateway: {error}") from None
    try:
        return PurgeAcknowledgement.from_dict(parse_json(payload, "the purge acknowledgement", MAX_PURGE_BYTES))
    except JsonMalformed as error:
        raise PurgeMalformed(str(error)) from None
