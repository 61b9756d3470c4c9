"""The silo's ``state/`` directory (mode 0700): keys, salt, plans, adapters, replies, and what was erased.

No record, no part of one and no name of a subject is ever written here; records are named by salted digests only.
Every file is written whole or not at all, so a killed process leaves nothing half-written that would be believed.
"""

import contextlib
import fcntl
import functools
import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from seqr.dsse import Envelope
from seqr.files import write_private
from seqr.keys import SigningKey, VerifyKey
from seqr.plan import Plan, verify_plan
from silo_client.config import SiloConfig
from silo_client.errors import PlanMissing, SiloBusy, StateDamaged

SALT_BYTES = 32
SUBDIRECTORIES = ("plans", "adapters", "checkpoints", "replies", "jobs")


class State:
    """One silo's state directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path) -> "State":
        """Make the directory, the signing key and the salt; what is there already is kept."""
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
        for name in SUBDIRECTORIES:
            (path / name).mkdir(mode=0o700, exist_ok=True)
        state = cls(path)
        if not state.signing_key_path.exists():
            SigningKey.generate().save(state.signing_key_path)
        if not state._salt_path.exists():
            write_private(state._salt_path, secrets.token_bytes(SALT_BYTES))
        return state

    @classmethod
    def open(cls, config: SiloConfig) -> "State":
        """The state directory of an initialised silo.

        Raises:
            StateDamaged: a part of it is missing.
        """
        state = cls(config.state_dir)
        for path in (state.signing_key_path, state._salt_path):
            if not path.is_file():
                raise StateDamaged(
                    f"{path} is missing; restore it from a backup, or run 'seqr silo init' in a new directory and "
                    "enrol it"
                )
        for name in SUBDIRECTORIES:
            (state.path / name).mkdir(mode=0o700, exist_ok=True)
        return state

    @property
    def signing_key_path(self) -> Path:
        return self.path / "signing.key"

    @property
    def node_key_path(self) -> Path:
        return self.path / "node.key"

    @property
    def _salt_path(self) -> Path:
        return self.path / "salt"

    def signing_key(self) -> SigningKey:
        return SigningKey.load(self.signing_key_path)

    @functools.cached_property
    def salt(self) -> bytes:
        """The silo's secret salt.

        Raises:
            StateDamaged: it does not have 32 bytes.
        """
        salt = self._salt_path.read_bytes()
        if len(salt) != SALT_BYTES:
            raise StateDamaged(
                f"{self._salt_path} has {len(salt)} bytes, expected {SALT_BYTES}; restore it from a backup"
            )
        return salt

    def salted(self, kind: str, text: str) -> str:
        """HMAC-SHA256 (64 hex) of ``text`` under the salt, kept apart by ``kind``."""
        return hmac.new(self.salt, f"{kind}\0{text}".encode(), hashlib.sha256).hexdigest()

    # Plans

    def save_plan(self, plan: Plan, envelope: bytes) -> None:
        """Keep a verified plan and make it the latest one."""
        write_private(self.path / "plans" / f"{plan.plan_id}.json", envelope)
        write_private(self.path / "plans" / "latest", plan.plan_id.encode())

    def latest_plan(self, coordinator: VerifyKey) -> Plan:
        """The plan received last, verified again.

        Raises:
            PlanMissing: no plan has been received.
        """
        try:
            name = (self.path / "plans" / "latest").read_text()
            envelope = (self.path / "plans" / f"{name}.json").read_bytes()
        except FileNotFoundError:
            raise PlanMissing(
                "no plan has been received yet; give one with --plan, or wait for the first job"
            ) from None
        return verify_plan(Envelope.from_json(envelope), coordinator)

    # One worker at a time

    @contextlib.contextmanager
    def lock(self, wait_seconds: float = 0.0) -> Iterator[None]:
        """Hold the silo for one worker; the kernel lets go of it when the process dies, however it dies.

        Raises:
            SiloBusy: another process holds it for longer than ``wait_seconds``.
        """
        deadline = time.monotonic() + wait_seconds
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise SiloBusy("another process of this silo is at work; try again when it is done") from None
                    time.sleep(0.2)
            yield
        finally:
            os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    write_private(path, json.dumps(value, indent=1, sort_keys=True).encode() + b"\n")


def read_json(path: Path) -> Any:
    """The JSON value of ``path``, or None where there is no such file.

    Raises:
        StateDamaged: it is not JSON, so something else has written it.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        raise StateDamaged(f"{path} is damaged; restore it from a backup") from None
