"""``seqr coordinator init``: everything a coordinator needs before it can be started."""

import os
import secrets
from pathlib import Path

from coordinator.db import upgrade
from coordinator.errors import StateDirExists
from coordinator.settings import Settings
from coordinator.subjects import SALT_BYTES
from seqr.files import write_private
from seqr.keys import SigningKey, VerifyKey
from seqr.settings import toml_value

NEVER_BACK_UP = "Data keys of bundles and open deletion requests. Deletion rests on this being the only copy.\n"


def init_state(settings: Settings, config: dict[str, str | int | bool]) -> VerifyKey:
    """Make folders, key, salt, configuration and schema; returns the public key that silos have to pin.

    An interrupted run is completed by the next one. Raises StateDirExists when there is a coordinator already.
    """
    if settings.signing_key_file.exists():
        raise StateDirExists(f"{settings.directory} holds a coordinator already; its key must not be replaced")
    if (settings.directory / "__init__.py").exists():
        raise StateDirExists(
            f"{settings.directory} holds a Python package; choose a directory for the coordinator's state"
        )
    settings.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    for folder in (settings.directory, settings.bundles, settings.keystore):
        folder.mkdir(exist_ok=True, mode=0o700)
        folder.chmod(0o700)
    if not settings.subject_salt_file.exists():
        write_private(settings.subject_salt_file, secrets.token_bytes(SALT_BYTES))
    if not settings.config_file.exists():
        _write_public(settings.config_file, render_config(config))
    _write_public(settings.keystore / "DO-NOT-BACK-UP.txt", NEVER_BACK_UP)
    upgrade(settings.database_url)
    key = SigningKey.generate()
    _write_public(settings.public_key_file, key.public.to_b64() + "\n")
    # Last: the key is what says that this directory is complete.
    key.save(settings.signing_key_file)
    return key.public


def use_certificate(settings: Settings) -> None:
    """Have the API and the SuperLink's door use the certificate of ``coordinator.certs``, unless they have one."""
    folder = settings.certificates.name
    lines = settings.config_file.read_text(encoding="utf-8") if settings.config_file.exists() else ""
    for part in ("ssl", "superlink"):
        if getattr(settings, f"{part}_certfile") is None:
            lines += f"{part}_certfile = {toml_value(f'{folder}/server.crt')}\n"
            lines += f"{part}_keyfile = {toml_value(f'{folder}/server.key')}\n"
    if settings.superlink_ca_file is None:
        lines += f"superlink_ca_file = {toml_value(f'{folder}/ca.crt')}\n"
    _write_public(settings.config_file, lines)


def render_config(values: dict[str, str | int | bool]) -> str:
    """``coordinator.toml`` as text."""
    lines = ["# Settings of this coordinator; SEQR_COORDINATOR_* variables win. Paths are relative to this file."]
    lines += [f"{name} = {toml_value(value)}" for name, value in values.items()]
    return "\n".join(lines) + "\n"


def _write_public(path: Path, text: str) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), "w", encoding="utf-8") as file:
        file.write(text)
