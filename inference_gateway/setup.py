"""What ``seqr gateway init`` makes."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from inference_gateway.settings import load_settings
from seqr.keys import KeyFileExists, SealingKey, SigningKey
from seqr.plan import GatewayKey
from seqr.settings import toml_value


def initialise(directory: Path, given: Mapping[str, Any]) -> tuple[dict[str, str], Path]:
    """Make ``directory`` (0700), two private keys, ``gateway-key.json`` and, with the settings given, ``gateway.toml``.

    Returns the public keys and the file they are in. Raises SettingsInvalid, NotText, and KeyFileExists where there
    is a gateway already: its keys are those that bundles are sealed for.
    """
    settings = load_settings(directory, **given)
    folder = settings.directory
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if settings.sealing_key_file.exists() or settings.signing_key_file.exists():
        raise KeyFileExists(f"{folder} holds a gateway's keys already; move them away to make new ones")
    lines = [f"{name} = {toml_value(_plain(value))}" for name, value in given.items()]
    sealing, signing = SealingKey.generate(), SigningKey.generate()
    signing.save(settings.signing_key_file)
    sealing.save(settings.sealing_key_file)
    public = asdict(GatewayKey.of(sealing.public, signing.public))
    settings.public_key_file.write_text(json.dumps(public, indent=2) + "\n", encoding="utf-8")
    if lines and not settings.config_file.exists():
        settings.config_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return public, settings.public_key_file


def _plain(value: Any) -> str | int:
    return value if isinstance(value, int) else str(value.absolute() if isinstance(value, Path) else value)
