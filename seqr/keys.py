"""Keys: Ed25519 for signatures, ML-KEM-768 with X25519 (HPKE) for sealing; private ones in PEM files of mode 0600."""

import base64
import binascii
import re
from pathlib import Path

from cryptography.exceptions import InvalidSignature, InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric import mlkem, x25519
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from seqr.canonical import sha256_hex
from seqr.errors import SeqrError
from seqr.files import write_private

_MLKEM_PUBLIC_BYTES = 1184
_X25519_PUBLIC_BYTES = 32
_MAX_KEY_FILE_BYTES = 64 * 1024
# The points of small order: y coordinates, sign bit cleared, with the encodings that are not reduced. OpenSSL
# accepts them as keys, and under some of them one fixed signature is valid for every message.
_SMALL_ORDER = {
    bytes.fromhex(y)
    for y in (
        "00" * 32,
        "01" + "00" * 31,
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ec" + "ff" * 30 + "7f",
        "ed" + "ff" * 30 + "7f",
        "ee" + "ff" * 30 + "7f",
    )
}
_PEM_BLOCK = re.compile(rb"-----BEGIN [A-Z ]+-----.*?-----END [A-Z ]+-----\s*", re.DOTALL)
_SUITE = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)


class KeyInvalid(SeqrError):
    """A key that cannot be read, or is of another kind than expected."""

    code = "key_invalid"


class KeyFileMissing(SeqrError):
    """A key file that does not exist or cannot be opened."""

    code = "key_file_missing"


class KeyFileExists(SeqrError):
    """Saving would overwrite a key, and a lost key cannot be made again."""

    code = "key_file_exists"


class KeyFileUnwritable(SeqrError):
    """A place where no key file can be written."""

    code = "key_file_unwritable"


class UnsealFailed(SeqrError):
    """The bytes were not sealed for this key, or were changed since."""

    code = "unseal_failed"


class VerifyKey:
    """An Ed25519 public key."""

    def __init__(self, key: Ed25519PublicKey) -> None:
        self._key = key
        self._raw = key.public_bytes_raw()

    @classmethod
    def from_b64(cls, text: str) -> "VerifyKey":
        """Read standard base64 of the 32 raw bytes; raises ``KeyInvalid``."""
        raw = _decode(text, 32, "an Ed25519 public key")
        if raw[:31] + bytes([raw[31] & 0x7F]) in _SMALL_ORDER:
            raise KeyInvalid("the Ed25519 public key is a point of small order: anyone can sign in its name")
        return cls(Ed25519PublicKey.from_public_bytes(raw))

    @classmethod
    def load(cls, path: str | Path) -> "VerifyKey":
        """Read a file that holds the base64 of the key; raises ``KeyFileMissing`` or ``KeyInvalid``."""
        return cls.from_b64(_read(Path(path)).decode("utf-8", "replace").strip())

    def to_b64(self) -> str:
        """Standard base64 of the 32 raw bytes."""
        return base64.b64encode(self._raw).decode("ascii")

    @property
    def key_id(self) -> str:
        """The first 16 hex digits of the SHA-256 of the raw key."""
        return sha256_hex(self._raw)[:16]

    @property
    def fingerprint(self) -> str:
        """What two people read to each other: ``SHA256:`` and the base64 of the digest, unpadded, as OpenSSH does."""
        digest = bytes.fromhex(sha256_hex(self._raw))
        return "SHA256:" + base64.b64encode(digest).decode("ascii").rstrip("=")

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Whether ``signature`` over ``message`` was made by the private half."""
        try:
            self._key.verify(signature, message)
        except InvalidSignature:
            return False
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VerifyKey) and self._raw == other._raw

    def __hash__(self) -> int:
        return hash(self._raw)

    def __repr__(self) -> str:
        return f"VerifyKey({self.key_id})"


class SigningKey:
    """An Ed25519 private key."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = VerifyKey(key.public_key())

    @classmethod
    def generate(cls) -> "SigningKey":
        """A new key from the system's random source."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: str | Path) -> "SigningKey":
        """Read a PEM PKCS8 file; raises ``KeyFileMissing`` or ``KeyInvalid``."""
        key = _load_pem(_read(Path(path)), Path(path))
        if not isinstance(key, Ed25519PrivateKey):
            raise KeyInvalid(f"{path} holds a {type(key).__name__}, expected an Ed25519 private key")
        return cls(key)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write a PEM PKCS8 file of mode 0600, whole or not at all; raises ``KeyFileExists``."""
        pem = self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        _write_private(Path(path), pem, overwrite)

    def sign(self, message: bytes) -> bytes:
        """The 64-byte signature over ``message``. Documents are signed through ``seqr.dsse``, not bare."""
        return self._key.sign(message)

    def __repr__(self) -> str:
        return f"SigningKey({self.public.key_id})"


class SealingPublicKey:
    """The public half of a sealing key: 1184 bytes of ML-KEM-768 followed by 32 bytes of X25519."""

    def __init__(self, kem: mlkem.MLKEM768PublicKey, curve: x25519.X25519PublicKey) -> None:
        self._key = hpke.MLKEM768X25519PublicKey(kem, curve)
        self._raw = kem.public_bytes_raw() + curve.public_bytes_raw()

    @classmethod
    def from_b64(cls, text: str) -> "SealingPublicKey":
        """Read standard base64 of the 1216 raw bytes; raises ``KeyInvalid``."""
        raw = _decode(text, _MLKEM_PUBLIC_BYTES + _X25519_PUBLIC_BYTES, "a sealing key")
        try:
            kem = mlkem.MLKEM768PublicKey.from_public_bytes(raw[:_MLKEM_PUBLIC_BYTES])
            return cls(kem, x25519.X25519PublicKey.from_public_bytes(raw[_MLKEM_PUBLIC_BYTES:]))
        except ValueError:
            raise KeyInvalid("the 1216 bytes are not an ML-KEM-768 and X25519 public key") from None

    def to_b64(self) -> str:
        """Standard base64 of the raw bytes."""
        return base64.b64encode(self._raw).decode("ascii")

    @property
    def key_id(self) -> str:
        """The first 16 hex digits of the SHA-256 of the raw key."""
        return sha256_hex(self._raw)[:16]

    def seal(self, plaintext: bytes, info: bytes) -> bytes:
        """HPKE (RFC 9180, base mode) of ``plaintext`` to this key, bound to ``info``."""
        try:
            return _SUITE.encrypt(plaintext, self._key, info=info)
        except ValueError:
            raise KeyInvalid(f"nothing can be sealed for key {self.key_id}: it is not a usable public key") from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SealingPublicKey) and self._raw == other._raw

    def __hash__(self) -> int:
        return hash(self._raw)

    def __repr__(self) -> str:
        return f"SealingPublicKey({self.key_id})"


class SealingKey:
    """A private sealing key. Its file holds two PEM PKCS8 blocks: ML-KEM-768, then X25519."""

    def __init__(self, kem: mlkem.MLKEM768PrivateKey, curve: x25519.X25519PrivateKey) -> None:
        self._kem = kem
        self._curve = curve
        self._key = hpke.MLKEM768X25519PrivateKey(kem, curve)
        self.public = SealingPublicKey(kem.public_key(), curve.public_key())

    @classmethod
    def generate(cls) -> "SealingKey":
        """A new key from the system's random source."""
        return cls(mlkem.MLKEM768PrivateKey.generate(), x25519.X25519PrivateKey.generate())

    @classmethod
    def load(cls, path: str | Path) -> "SealingKey":
        """Read the file written by ``save``; raises ``KeyFileMissing`` or ``KeyInvalid``."""
        blocks = _PEM_BLOCK.findall(_read(Path(path)))
        keys = [_load_pem(block, Path(path)) for block in blocks]
        match keys:
            case [mlkem.MLKEM768PrivateKey() as kem, x25519.X25519PrivateKey() as curve]:
                return cls(kem, curve)
        kinds = ", ".join(type(key).__name__ for key in keys) or "no key"
        raise KeyInvalid(f"{path} holds {kinds}; a sealing key file holds an ML-KEM-768 and then an X25519 private key")

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write both halves as PEM PKCS8 into a file of mode 0600; raises ``KeyFileExists``."""
        form = (Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        _write_private(Path(path), self._kem.private_bytes(*form) + self._curve.private_bytes(*form), overwrite)

    def unseal(self, sealed: bytes, info: bytes) -> bytes:
        """What was sealed for this key under the same ``info``; raises ``UnsealFailed``."""
        try:
            return _SUITE.decrypt(sealed, self._key, info=info)
        except (InvalidTag, ValueError):
            raise UnsealFailed(f"the bytes do not open with key {self.public.key_id}") from None

    def __repr__(self) -> str:
        return f"SealingKey({self.public.key_id})"


def _decode(text: str, size: int, what: str) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise KeyInvalid(f"expected {what} as standard base64, got text that is not base64") from None
    if len(raw) != size:
        raise KeyInvalid(f"expected {what} of {size} bytes, got {len(raw)}")
    return raw


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_KEY_FILE_BYTES + 1)
    except OSError as error:
        raise KeyFileMissing(f"the key file {path} cannot be read: {error.strerror}") from None
    if len(data) > _MAX_KEY_FILE_BYTES:
        raise KeyInvalid(f"{path} is too large for a key file")
    return data


def _load_pem(data: bytes, path: Path) -> object:
    try:
        return load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise KeyInvalid(f"{path} is not an unencrypted PEM private key") from None


def _write_private(path: Path, data: bytes, overwrite: bool) -> None:
    try:
        write_private(path, data, replace=overwrite)
    except FileExistsError:
        raise KeyFileExists(f"{path} exists already; move it away to make a new key") from None
    except OSError as error:
        raise KeyFileUnwritable(f"the key file {path} cannot be written: {error.strerror}") from None
