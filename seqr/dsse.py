"""Signed envelopes: DSSE v1 (https://github.com/secure-systems-lab/dsse) with Ed25519, several signatures allowed."""

import base64
import binascii
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from seqr.canonical import JsonMalformed, canonical_json, parse_json
from seqr.errors import SeqrError
from seqr.keys import SigningKey, VerifyKey

MAX_ENVELOPE_BYTES = 16 * 1024 * 1024
MAX_SIGNATURES = 16


class EnvelopeMalformed(SeqrError):
    """Bytes that are not a DSSE envelope."""

    code = "envelope_malformed"


class SignatureInvalid(SeqrError):
    """No signature of the envelope verifies under a key that is trusted for it."""

    code = "signature_invalid"


class PayloadTypeMismatch(SeqrError):
    """A signed document of one kind presented where another kind is expected."""

    code = "payload_type_mismatch"


@dataclass(frozen=True)
class Signature:
    """One signature; ``key_id`` is an unauthenticated hint and decides nothing."""

    key_id: str
    value: bytes


@dataclass(frozen=True)
class Envelope:
    """A payload, its type and the signatures over both. Nothing in it is trusted before ``verify``."""

    payload_type: str
    payload: bytes
    signatures: tuple[Signature, ...]

    def add_signature(self, key: SigningKey) -> "Envelope":
        """A copy that also carries the signature of ``key`` (a second one by the same key replaces the first)."""
        value = key.sign(pre_authentication_encoding(self.payload_type, self.payload))
        others = tuple(s for s in self.signatures if s.key_id != key.public.key_id)
        return replace(self, signatures=(*others, Signature(key.public.key_id, value)))

    def to_dict(self) -> dict[str, Any]:
        """The envelope's JSON object, for embedding in another document."""
        return {
            "payload": base64.b64encode(self.payload).decode("ascii"),
            "payloadType": self.payload_type,
            "signatures": [
                {"keyid": s.key_id, "sig": base64.b64encode(s.value).decode("ascii")} for s in self.signatures
            ],
        }

    def to_json(self) -> bytes:
        """The envelope as canonical JSON bytes."""
        return canonical_json(self.to_dict())

    @classmethod
    def from_json(cls, data: bytes | str, max_bytes: int = MAX_ENVELOPE_BYTES) -> "Envelope":
        """Read an envelope; raises ``EnvelopeMalformed`` (size is checked before anything is decoded)."""
        try:
            raw = data.encode("utf-8") if isinstance(data, str) else bytes(data)
            return cls.from_dict(parse_json(raw, "the envelope", max_bytes))
        except (JsonMalformed, UnicodeEncodeError) as error:
            raise EnvelopeMalformed(str(error)) from None

    @classmethod
    def from_dict(cls, document: Any) -> "Envelope":
        """Read an envelope from its JSON object; raises ``EnvelopeMalformed``."""
        if not isinstance(document, dict) or set(document) != {"payload", "payloadType", "signatures"}:
            raise EnvelopeMalformed("an envelope is an object with exactly payload, payloadType and signatures")
        entries = document["signatures"]
        if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_SIGNATURES:
            raise EnvelopeMalformed(f"an envelope carries a list of 1 to {MAX_SIGNATURES} signatures")
        signatures = []
        for entry in entries:
            if not isinstance(entry, dict) or set(entry) != {"keyid", "sig"}:
                raise EnvelopeMalformed("a signature is an object with exactly keyid and sig")
            signatures.append(Signature(_text(entry["keyid"], "keyid"), _base64(entry["sig"], "sig")))
        payload_type = _text(document["payloadType"], "payloadType")
        return cls(payload_type, _base64(document["payload"], "payload"), tuple(signatures))


def sign(payload_type: str, payload: bytes, key: SigningKey) -> Envelope:
    """An envelope around ``payload`` with one signature by ``key``."""
    return Envelope(payload_type, payload, ()).add_signature(key)


def verify(envelope: Envelope, keys: Iterable[VerifyKey], payload_type: str) -> bytes:
    """The payload, if one of ``keys`` signed it as ``payload_type``.

    Every key is tried on every signature, because a key id is only a hint. Raises ``PayloadTypeMismatch`` or
    ``SignatureInvalid``.
    """
    if envelope.payload_type != payload_type:
        raise PayloadTypeMismatch(f"expected a signed {payload_type}, got {envelope.payload_type!r}")
    trusted = tuple(keys)
    if signers(envelope, trusted):
        return envelope.payload
    expected = ", ".join(key.key_id for key in trusted) or "none, because no key is trusted for it"
    got = ", ".join(s.key_id for s in envelope.signatures) or "none"
    raise SignatureInvalid(
        f"the {payload_type} is not validly signed: expected a signature by key {expected}; it carries one by {got!r}"
    )


def signers(envelope: Envelope, keys: Iterable[VerifyKey]) -> tuple[VerifyKey, ...]:
    """Those of ``keys`` that signed ``envelope``; says nothing about its type."""
    message = pre_authentication_encoding(envelope.payload_type, envelope.payload)
    return tuple(key for key in keys if any(key.verifies(s.value, message) for s in envelope.signatures))


def pre_authentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """DSSE v1 PAE: what is signed. Lengths make type and payload inseparable."""
    kind = payload_type.encode("utf-8")
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def _text(value: object, field: str) -> str:
    if not isinstance(value, str) or len(value) > 256 or not value.isprintable():
        raise EnvelopeMalformed(f"{field} must be printable text of at most 256 characters")
    return value


def _base64(value: object, field: str) -> bytes:
    if not isinstance(value, str):
        raise EnvelopeMalformed(f"{field} must be base64 text, got {type(value).__name__}")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise EnvelopeMalformed(f"{field} is not valid base64") from None
