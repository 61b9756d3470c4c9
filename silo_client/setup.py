"""``seqr silo init``: the settings file, the keys and the base model of a new silo."""

import csv
import json
import os
from pathlib import Path
from typing import Any

from seqr.files import write_private
from seqr.keys import VerifyKey
from silo_client.config import CONFIG_NAME, FORMATS, SiloConfig, load_config, render_config
from silo_client.enrol import create_node_key
from silo_client.errors import AlreadyInitialised, BaseModelMissing, ConfigInvalid, DataFileMissing
from silo_client.state import State

BASE_MODEL_FOLDER = "base-model"
HUB = "hub:"
# Columns taken up by themselves when the first row of the data has them and no option says otherwise.
SUBJECT = "subject"
USUAL_COLUMNS = {"subject_column": (SUBJECT,), "key_column": ("key",)}


def initialise(directory: Path, values: dict[str, Any], data: list[Path], columns: dict[str, str | None]) -> SiloConfig:
    """Write ``silo.toml`` and make the state directory; nothing is sent anywhere.

    The base model comes last, see ``base_model_setting``: preparing it takes a while.

    Raises:
        AlreadyInitialised: there is a ``silo.toml``; it is left as it is.
        ConfigInvalid, KeyInvalid, DataFileMissing, BaseModelMissing: a value cannot be used; nothing is left behind.
    """
    path = directory / CONFIG_NAME
    if path.exists():
        raise AlreadyInitialised(f"{path} exists; edit it, or choose another directory for another silo")
    VerifyKey.from_b64(values["coordinator"]["public_key"])
    sources = [_source(directory, file, columns) for file in data]
    base_model = base_model_setting(directory, values["base_model"])
    directory.mkdir(parents=True, exist_ok=True)
    write_private(path, render_config({**values, "base_model": base_model, "data": sources}).encode())
    try:
        config = load_config(directory)
    except ConfigInvalid:
        path.unlink()
        raise
    create_node_key(State.create(config.state_dir))
    return config


def base_model_setting(directory: Path, source: str) -> str:
    """What to write for ``base_model``: a model directory as it is, anything else after preparing it once.

    Only what begins with ``hub:`` is asked of the model hub. Raises BaseModelMissing.
    """
    path = Path(source)
    if (path / "config.json").is_file():
        return portable(directory, path)
    if not source.startswith(HUB) and not path.exists():
        raise BaseModelMissing(
            f"there is no base model at {source}; give a model directory, a .gguf file, or {HUB}OWNER/NAME to fetch "
            "one from the model hub"
        )
    from seqr.models import prepare_base_model

    directory.mkdir(parents=True, exist_ok=True)
    prepare_base_model(source.removeprefix(HUB), directory / BASE_MODEL_FOLDER)
    return BASE_MODEL_FOLDER


def portable(directory: Path, path: Path) -> str:
    """``path`` relative to the silo directory where it lies inside it, else absolute."""
    absolute, root = path.resolve(), directory.resolve()
    return str(absolute.relative_to(root)) if absolute.is_relative_to(root) else os.fspath(absolute)


def _source(directory: Path, file: Path, columns: dict[str, str | None]) -> dict[str, Any]:
    kind = FORMATS.get(file.suffix.lower())
    if kind is None:
        raise ConfigInvalid(f"{file} is neither .jsonl nor .csv; convert it, or name its format in {CONFIG_NAME}")
    source: dict[str, Any] = {"path": portable(directory, file), "format": kind}
    source |= {name: value for name, value in columns.items() if value is not None}
    present = _first_columns(file, kind)
    if not present:
        # An empty or unreadable file must not decide for good that nobody can be erased: 'check' will name the column.
        present = [SUBJECT]
    for name, usual in USUAL_COLUMNS.items():
        found = next((column for column in usual if column in present), None)
        if name not in source and found is not None:
            source[name] = found
    return source


def _first_columns(file: Path, kind: str) -> list[str]:
    """The columns of the first row, as far as it can be read; what is wrong with the file is for 'check' to say."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            if kind == "csv":
                return next(csv.reader(lines), [])
            first = json.loads(next((line for line in lines if line.strip()), "{}"))
            return list(first) if isinstance(first, dict) else []
    except OSError as error:
        raise DataFileMissing(str(file), f"the data file cannot be read: {error.strerror}") from None
    except (ValueError, csv.Error):
        return []
