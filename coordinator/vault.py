"""Encrypted files whose keys can be destroyed: once its key is gone, an item cannot be read back from a backup.

Every item has its own AES-256-GCM data key in ``keystore/``; that folder must never be backed up. Overwriting a key
before unlinking it does what a file system allows; copy-on-write and flash storage may keep old blocks.
"""

import os
import secrets
from contextlib import suppress
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from coordinator.errors import BundleCorrupt, BundleDestroyed
from seqr.canonical import sha256_hex
from seqr.files import sync_folder, write_private

_NONCE_BYTES = 12
_KEY_BYTES = 32


class Keystore:
    """One random data key per name, each in a file of mode 0600."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def create(self, name: str) -> bytes:
        """A new key for ``name``, replacing one that an unfinished attempt left behind."""
        key = secrets.token_bytes(_KEY_BYTES)
        write_private(self._path(name), key)
        return key

    def get(self, name: str) -> bytes:
        """The key; raises BundleDestroyed when it has been destroyed."""
        try:
            return self._path(name).read_bytes()
        except FileNotFoundError:
            raise BundleDestroyed(f"the data key of {name} has been destroyed") from None

    def destroy(self, name: str) -> None:
        """Overwrite and remove the key; does nothing when it is gone already."""
        path = self._path(name)
        with suppress(FileNotFoundError):
            with path.open("r+b") as file:
                file.write(secrets.token_bytes(_KEY_BYTES))
                file.flush()
                os.fsync(file.fileno())
            path.unlink()
            sync_folder(self._folder)

    def holds(self, name: str) -> bool:
        return self._path(name).exists()

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.key"


def seal(key: bytes, plaintext: bytes, associated: bytes) -> bytes:
    """AES-256-GCM with a random nonce in front; ``associated`` is authenticated, not stored."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, plaintext, associated)


def unseal(key: bytes, sealed: bytes, associated: bytes) -> bytes:
    """What ``seal`` was given; raises BundleCorrupt."""
    try:
        return AESGCM(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], associated)
    except (InvalidTag, ValueError):
        raise BundleCorrupt("a sealed item does not open with its key: the file or the key was changed") from None


class Vault:
    """The sealed bundles. A bundle is sealed for the gateways already; this layer is what makes it destroyable."""

    def __init__(self, bundles: Path, keystore: Keystore) -> None:
        self._bundles = bundles
        self._keystore = keystore

    def put(self, revision_id: str, bundle: bytes, silo_id: str, plan_id: str, revision: int) -> str:
        """Store ``bundle`` durably and return its SHA-256 (hex). Replaces an unfinished earlier attempt."""
        digest = sha256_hex(bundle)
        key = self._keystore.create(revision_id)
        write_private(self._path(revision_id), seal(key, bundle, _associated(silo_id, plan_id, revision, digest)))
        return digest

    def get(self, revision_id: str, silo_id: str, plan_id: str, revision: int, digest: str) -> bytes:
        """The bundle; raises BundleDestroyed or BundleCorrupt."""
        key = self._keystore.get(revision_id)
        try:
            sealed = self._path(revision_id).read_bytes()
        except FileNotFoundError:
            raise BundleDestroyed(f"the bundle of revision {revision_id} has been destroyed") from None
        return unseal(key, sealed, _associated(silo_id, plan_id, revision, digest))

    def destroy(self, revision_id: str) -> None:
        """Destroy the data key first, then the file: from the first moment on nothing can be opened. Repeatable."""
        self._keystore.destroy(revision_id)
        with suppress(FileNotFoundError):
            self._path(revision_id).unlink()
            sync_folder(self._bundles)

    def _path(self, revision_id: str) -> Path:
        return self._bundles / f"{revision_id}.sealed"


def _associated(silo_id: str, plan_id: str, revision: int, digest: str) -> bytes:
    return f"{silo_id}|{plan_id}|{revision}|{digest}".encode()
