"""The base model that a benchmark runs on, prepared once and kept where ``seqr demo`` keeps it."""

from pathlib import Path

DEFAULT_MODEL = "SmolLM2-135M-Instruct"


def model_directory(model: str | Path, cache: Path) -> Path:
    """The directory of ``model``, a directory or a .gguf file; empty for SmolLM2-135M, which is fetched if need be.

    Raises ``BaseModelUnavailable``, ``BaseModelNotFound`` or ``BaseModelUnreadable``.
    """
    from seqr.models import base_model_digest, prepare_base_model
    from seqr.smollm2 import fetch_smollm2

    if not str(model):
        return prepare_base_model(fetch_smollm2(cache), cache / DEFAULT_MODEL)
    path = Path(model)
    if path.is_file():
        return prepare_base_model(path, cache / path.stem)
    base_model_digest(path)  # says so if it is no model
    return path
