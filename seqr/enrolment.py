"""A silo's claim to be let into a federation: its public keys, signed by the very key it names."""

from dataclasses import asdict, dataclass, fields

from seqr import dsse
from seqr.canonical import JsonMalformed, canonical_json, parse_json
from seqr.document import Fields
from seqr.errors import SeqrError
from seqr.keys import SigningKey, VerifyKey

ENROLMENT_PAYLOAD_TYPE = "application/vnd.seqr.enrolment+json"
MAX_ENROLMENT_BYTES = 16 * 1024
# The form of a silo id, as a regular expression for the whole of it.
SILO_ID = "[A-Za-z0-9][A-Za-z0-9._-]{0,63}"


class EnrolmentMalformed(SeqrError):
    """An enrolment with a missing, unknown or impossible field."""

    code = "enrolment_malformed"


@dataclass(frozen=True)
class EnrolmentClaim:
    """Who asks: ``signing_key`` is Ed25519 in base64, ``node_key`` Flower's EC key in OpenSSH or PEM form."""

    silo_id: str
    display_name: str
    signing_key: str
    node_key: str


def sign_enrolment(claim: EnrolmentClaim, key: SigningKey) -> dsse.Envelope:
    """The claim in an envelope signed by the silo."""
    return dsse.sign(ENROLMENT_PAYLOAD_TYPE, canonical_json(asdict(claim)), key)


def verify_enrolment(envelope: dsse.Envelope, key: VerifyKey) -> EnrolmentClaim:
    """The claim in ``envelope``, if ``key`` signed it. What its values mean is for the coordinator to judge.

    Raises ``SignatureInvalid``, ``PayloadTypeMismatch`` or ``EnrolmentMalformed``.
    """
    payload = dsse.verify(envelope, [key], ENROLMENT_PAYLOAD_TYPE)
    try:
        document = parse_json(payload, "the enrolment", MAX_ENROLMENT_BYTES)
    except JsonMalformed as error:
        raise EnrolmentMalformed(str(error)) from None
    names = [field.name for field in fields(EnrolmentClaim)]
    claim = Fields(document, "the enrolment", EnrolmentMalformed, names)
    for name in names:
        if not isinstance(claim.raw(name), str):
            raise claim.refuse(name, "text")
    return EnrolmentClaim(**{name: claim.raw(name) for name in names})
