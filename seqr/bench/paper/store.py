"""What a run has finished, on disk: adapters by the digest of everything that made them, results by name."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from seqr.canonical import canonical_json, sha256_hex
from seqr.routers.pool import Factors, LoraFactors


class Store:
    """Two folders: ``adapters``, which runs may share, and ``results``, of one run.

    Every file is written whole or not at all, so a run that is killed goes on where it was.
    """

    def __init__(self, adapters: Path, results: Path):
        self.adapters = adapters
        self.results = results
        for folder in (adapters, results):
            folder.mkdir(parents=True, exist_ok=True)

    def adapter(self, recipe: dict[str, Any], train: Callable[[], Factors]) -> Factors:
        """The adapter that ``recipe`` describes, on the CPU, trained now if it is not here yet."""
        digest = adapter_digest(recipe)
        if (kept := self.kept_adapter(digest)) is not None:
            return kept
        factors = {module: LoraFactors(f.a.cpu(), f.b.cpu()) for module, f in train().items()}
        parts = {f"{m}.{k}": v.contiguous() for m, f in factors.items() for k, v in (("a", f.a), ("b", f.b))}
        _whole(self._adapter_file(digest), lambda partial: save_file(parts, partial))
        return factors

    def kept_adapter(self, digest: str) -> Factors | None:
        """The adapter of an ``adapter_digest``, or None."""
        if not self.has_adapter(digest):
            return None
        tensors = load_file(self._adapter_file(digest))
        modules = dict.fromkeys(name.removesuffix(".a").removesuffix(".b") for name in tensors)
        return {m: LoraFactors(tensors[f"{m}.a"], tensors[f"{m}.b"]) for m in modules}

    def has_adapter(self, digest: str) -> bool:
        """Whether ``kept_adapter`` has it."""
        return self._adapter_file(digest).exists()

    def result(self, name: str) -> Any:
        """The JSON value stored under ``name``, or None."""
        try:
            return json.loads((self.results / f"{name}.json").read_bytes())
        except FileNotFoundError:
            return None

    def has_result(self, name: str) -> bool:
        """Whether a JSON value is stored under ``name``."""
        return (self.results / f"{name}.json").exists()

    def has_arrays(self, name: str) -> bool:
        """Whether tensors are stored under ``name``."""
        return (self.results / f"{name}.safetensors").exists()

    def keep(self, name: str, value: Any) -> None:
        """Store a JSON value under ``name``."""
        _whole(self.results / f"{name}.json", lambda partial: partial.write_text(json.dumps(value), "utf-8"))

    def arrays(self, name: str) -> dict[str, torch.Tensor] | None:
        """The tensors stored under ``name``, or None."""
        file = self.results / f"{name}.safetensors"
        return _load(file) if file.exists() else None

    def keep_arrays(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Store tensors under ``name``."""
        parts = {key: tensor.contiguous() for key, tensor in tensors.items()}
        _whole(self.results / f"{name}.safetensors", lambda partial: save_file(parts, partial))

    def _adapter_file(self, digest: str) -> Path:
        return self.adapters / f"{digest}.safetensors"


def adapter_digest(recipe: dict[str, Any]) -> str:
    """By what an adapter is kept: 32 hex digits."""
    return sha256_hex(canonical_json(recipe))[:32]


def _load(file: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(file, device=str(torch.get_default_device()))
    return tensors


def _whole(file: Path, write: Callable[[Path], object]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    write(partial)
    partial.rename(file)
