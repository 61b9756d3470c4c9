"""The bundle that carries a revision: signed manifest and tensors, sealed so that only the plan's gateways can read it.

    "SEQRBDL1" | header length, 4 bytes | header, JSON | nonce, 12 bytes | AES-256-GCM ciphertext and tag

The header names every recipient with the content key sealed to it (HPKE); magic, length and header are the ciphertext's
associated data. Inside: manifest envelope length, 4 bytes | manifest envelope, JSON | safetensors. Integers are
big-endian.
"""

import base64
import binascii
import os
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from seqr import dsse
from seqr.canonical import JsonMalformed, canonical_json, parse_json
from seqr.document import Fields
from seqr.job import MAX_REVISION
from seqr.keys import SealingKey, SealingPublicKey, SigningKey, UnsealFailed
from seqr.plan import MAX_GATEWAYS, MAX_MODULES, GatewayKey, Plan
from seqr.refusals import BundleNotForThisGateway, BundleTooLarge, BundleUnreadable, ManifestMalformed

if TYPE_CHECKING:
    from seqr.adapter import Adapter

__all__ = [
    "BundleNotForThisGateway",
    "BundleTooLarge",
    "BundleUnreadable",
    "Manifest",
    "ManifestMalformed",
    "OpenedBundle",
    "largest_bundle",
    "largest_tensors",
    "open_sealed",
    "seal",
    "sign_manifest",
]

MANIFEST_TYPE = "seqr/manifest/v1"
MANIFEST_PAYLOAD_TYPE = "application/vnd.seqr.manifest+json"
MAGIC = b"SEQRBDL1"
HEADER_FORMAT = "seqr/bundle/v1"
MAX_BUNDLE_BYTES = 2**31 - 2**20  # AES-GCM takes less than 2 GiB at once
MAX_HEADER_BYTES = 256 * 1024
MAX_MANIFEST_BYTES = 16 * 1024 * 1024
_HPKE_INFO = b"seqr/bundle/v1 content key"
_KEY_BYTES = 32
_NONCE_BYTES = 12
_LENGTH = struct.Struct(">I")


@dataclass(frozen=True)
class Manifest:
    """What a silo signs about one revision (docs/architecture.md).

    ``tensors`` maps stored tensor names to SHA-256; ``records`` and ``tokens`` are None unless the owner shares counts;
    ``dataset_root`` is the Merkle root (hex) of salted record digests; from ``expires_at`` on it may not be admitted.
    """

    plan_id: str
    silo_id: str
    revision: int
    job_nonce: str
    tensors: dict[str, str]
    adapter_digest: str
    records: int | None
    tokens: int | None
    environment: dict[str, str]
    dataset_root: str
    expires_at: str
    dp: dict[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The manifest's JSON object, as signed."""
        return {"type": MANIFEST_TYPE, **asdict(self)}

    @classmethod
    def from_dict(cls, document: Any) -> "Manifest":
        """Read and check a manifest's JSON object; raises ``ManifestMalformed``."""
        manifest = Fields(document, "the manifest", ManifestMalformed, {f.name for f in fields(cls)} | {"type"})
        manifest.constant("type", MANIFEST_TYPE)
        return cls(
            plan_id=manifest.identifier("plan_id"),
            silo_id=manifest.identifier("silo_id"),
            revision=manifest.integer("revision", 1, MAX_REVISION),
            job_nonce=manifest.identifier("job_nonce"),
            tensors=manifest.digest_map("tensors", 4 * MAX_MODULES),
            adapter_digest=manifest.digest("adapter_digest"),
            records=None if manifest.absent("records") else manifest.integer("records", 0, 2**53),
            tokens=None if manifest.absent("tokens") else manifest.integer("tokens", 0, 2**53),
            environment=manifest.text_map("environment"),
            dataset_root=manifest.digest("dataset_root"),
            expires_at=manifest.time("expires_at"),
            dp=None if manifest.absent("dp") else manifest.number_map("dp"),
        )


@dataclass(frozen=True)
class OpenedBundle:
    """What was inside a bundle. Decryption proves nothing about the sender: see ``seqr.intake``."""

    manifest_envelope: dsse.Envelope
    tensors_bytes: bytes


def sign_manifest(manifest: Manifest, key: SigningKey) -> dsse.Envelope:
    """The manifest in an envelope signed by the silo; raises ``ManifestMalformed`` rather than sign nonsense."""
    checked = Manifest.from_dict(manifest.to_dict())
    return dsse.sign(MANIFEST_PAYLOAD_TYPE, canonical_json(checked.to_dict()), key)


def seal(adapter: "Adapter", manifest_envelope: dsse.Envelope, gateway_keys: Iterable[GatewayKey]) -> bytes:
    """The bundle of ``adapter``, readable by the holders of ``gateway_keys`` and nobody else.

    A fresh content key each time: sealing the same adapter twice gives different bytes.
    Raises ``KeyInvalid`` or ``BundleTooLarge``.
    """
    recipients = [SealingPublicKey.from_b64(key.sealing_key) for key in gateway_keys]
    if not recipients:
        raise ValueError("a bundle needs at least one gateway key")
    content_key = AESGCM.generate_key(_KEY_BYTES * 8)
    sealed = {key.key_id: base64.b64encode(key.seal(content_key, _HPKE_INFO)).decode("ascii") for key in recipients}
    entries = [{"key_id": key_id, "sealed_key": value} for key_id, value in sealed.items()]
    header = canonical_json({"format": HEADER_FORMAT, "recipients": entries})
    preamble = MAGIC + _LENGTH.pack(len(header)) + header
    envelope = manifest_envelope.to_json()
    nonce = os.urandom(_NONCE_BYTES)
    content = _LENGTH.pack(len(envelope)) + envelope + adapter.to_bytes()
    if len(content) + len(preamble) + 64 > MAX_BUNDLE_BYTES:
        raise BundleTooLarge(f"the adapter takes {len(content)} bytes, a bundle can hold {MAX_BUNDLE_BYTES}")
    return preamble + nonce + AESGCM(content_key).encrypt(nonce, content, preamble)


def open_sealed(blob: bytes, sealing_key: SealingKey, max_bytes: int = MAX_BUNDLE_BYTES) -> OpenedBundle:
    """Open a bundle; raises ``BundleTooLarge``, ``BundleNotForThisGateway`` or ``BundleUnreadable``.

    ``max_bytes`` is ``largest_bundle(plan)`` where the plan is known. Sizes are checked before anything is decoded.
    """
    if len(blob) > max_bytes:
        raise BundleTooLarge(f"the bundle has {len(blob)} bytes, more than the {max_bytes} allowed")
    preamble, sealed_key = _read_preamble(blob, sealing_key.public.key_id)
    try:
        content_key = sealing_key.unseal(sealed_key, _HPKE_INFO)
        nonce = blob[len(preamble) : len(preamble) + _NONCE_BYTES]
        content = AESGCM(content_key).decrypt(nonce, blob[len(preamble) + _NONCE_BYTES :], preamble)
    except (UnsealFailed, InvalidTag, ValueError):
        raise BundleUnreadable("the bundle does not open: its bytes are not those that were sealed") from None
    size = _LENGTH.unpack_from(content)[0] if len(content) >= _LENGTH.size else 0
    if not 0 < size <= min(MAX_MANIFEST_BYTES, len(content) - _LENGTH.size):
        raise BundleUnreadable(f"the bundle claims a manifest of {size} bytes, which it cannot hold")
    try:
        envelope = dsse.Envelope.from_json(content[_LENGTH.size : _LENGTH.size + size], MAX_MANIFEST_BYTES)
    except dsse.EnvelopeMalformed as error:
        raise BundleUnreadable(f"the manifest in the bundle is unreadable: {error}") from None
    return OpenedBundle(envelope, content[_LENGTH.size + size :])


def largest_tensors(plan: Plan) -> int:
    """The most bytes an adapter of ``plan`` can take as safetensors: fp32 values and a generous header."""
    values = sum(module.out_features * plan.rank + plan.rank**2 + 2 for module in plan.modules)
    header = sum(4 * (len(module.name) + 128) for module in plan.modules)
    return 4 * values + header + 1024


def largest_bundle(plan: Plan) -> int:
    """The most bytes a bundle of ``plan`` can take, for refusing larger ones before they are stored or opened."""
    names = sum(len(module.name) for module in plan.modules)
    manifest = 2 * (4 * (names + 128 * len(plan.modules)) + 64 * 1024)  # twice: base64 and slack
    return min(MAX_BUNDLE_BYTES, len(MAGIC) + MAX_HEADER_BYTES + manifest + largest_tensors(plan))


def _read_preamble(blob: bytes, key_id: str) -> tuple[bytes, bytes]:
    start = len(MAGIC) + _LENGTH.size
    if len(blob) < start or not blob.startswith(MAGIC):
        raise BundleUnreadable(f"the bundle does not begin with {MAGIC!r}")
    (size,) = _LENGTH.unpack_from(blob, len(MAGIC))
    if size > min(MAX_HEADER_BYTES, len(blob) - start):
        raise BundleUnreadable(f"the bundle claims a header of {size} bytes, which it cannot hold")
    try:
        document = parse_json(blob[start : start + size], "the bundle header", MAX_HEADER_BYTES)
    except JsonMalformed as error:
        raise BundleUnreadable(str(error)) from None
    header = Fields(document, "the bundle header", BundleUnreadable, ("format", "recipients"))
    header.constant("format", HEADER_FORMAT)
    named = []
    for item in header.items("recipients", MAX_GATEWAYS):
        entry = Fields(item, "a recipient of the bundle", BundleUnreadable, ("key_id", "sealed_key"))
        named.append(entry.identifier("key_id"))
        if named[-1] == key_id:
            try:
                return blob[: start + size], base64.b64decode(entry.text("sealed_key", 4096), validate=True)
            except (binascii.Error, ValueError):
                raise entry.refuse("sealed_key", "standard base64") from None
    raise BundleNotForThisGateway(
        f"the bundle is sealed for {', '.join(named) or 'nobody'}, this gateway's key is {key_id}; "
        "the silo must train under a plan that names this gateway"
    )
