"""Base models: load, identify by digest, prepare once for fast loading, and name the Linears that can be adapted."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seqr.canonical import canonical_json, sha256_hex
from seqr.errors import SeqrError
from seqr.plan import ModuleSpec
from seqr.smollm2 import BaseModelUnavailable, fetch_smollm2
from seqr.tiny_model import build_tiny_model

__all__ = [
    "BaseModelNotFound",
    "BaseModelSpec",
    "BaseModelUnavailable",
    "BaseModelUnreadable",
    "base_model_digest",
    "build_tiny_model",
    "fetch_smollm2",
    "inspect_base_model",
    "linear_module_names",
    "load_base_model",
    "prepare_base_model",
]

# Weights, configuration and tokenizer; nothing else in the directory changes what the model computes.
_DIGESTED_SUFFIXES = {".safetensors", ".json", ".jinja", ".model", ".txt"}
_SOURCE_NOTE = ".seqr-source.json"
# What save_pretrained writes about the machine and the moment rather than the model: without it, two machines that
# prepare the same source get the same digest.
_INCIDENTAL = {"transformers_version", "_name_or_path", "_model_name_or_path", "_from_model_config", "is_local"}
_INCIDENTAL |= {"local_files_only"}
_ATTENTION_PARTS = {"self_attn", "attn", "attention", "self_attention"}


class BaseModelNotFound(SeqrError):
    """No base model at the path given."""

    code = "base_model_not_found"


class BaseModelUnreadable(SeqrError):
    """Files that are no causal language model which transformers can load."""

    code = "base_model_unreadable"


@dataclass(frozen=True)
class BaseModelSpec:
    """What a plan says about a base model: a name, its digest and its adaptable Linears."""

    name: str
    digest: str
    modules: tuple[ModuleSpec, ...]


def load_base_model(
    path_or_id: str | Path, dtype: torch.dtype, attn_implementation: str | None = None
) -> tuple[Any, Any]:
    """(model, tokenizer) of a hub id, a local directory or a ``*.gguf`` file; the model in ``dtype``, eval mode.

    Only safetensors and GGUF are read, never a pickle, and no code that comes with a model is run.
    Raises ``BaseModelNotFound`` or ``BaseModelUnreadable``.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where, options = _locate(path_or_id)
    extra: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    if "gguf_file" in options:
        # transformers would keep the blocks packed, in modules that are no nn.Linear and cannot be adapted.
        extra["quantization_config"] = GgufConfig(dequantize=True)
    else:
        extra["use_safetensors"] = True
    with _reading(path_or_id), _without_progress_bars():
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **options, **extra)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def base_model_digest(path: str | Path) -> str:
    """``sha256:<hex>`` of a GGUF file, or of a model directory.

    For a directory: over the sorted names and SHA-256 of its weight, config and tokenizer files.
    Raises ``BaseModelNotFound``.
    """
    path = Path(path)
    if path.is_file():
        return "sha256:" + _file_sha256(path)
    files = {
        file.name: _file_sha256(file)
        for file in (path.iterdir() if path.is_dir() else ())
        if file.is_file() and file.suffix in _DIGESTED_SUFFIXES and not file.name.startswith(".")
    }
    if "config.json" not in files:
        raise BaseModelNotFound(f"{path} is neither a GGUF file nor a directory with a model's config.json")
    return "sha256:" + sha256_hex(canonical_json(files))


def prepare_base_model(source: str | Path, out_dir: str | Path) -> Path:
    """Turn a GGUF file, a hub id or a directory into a bf16 safetensors directory, once, so that later loads are fast.

    Whole or not at all; returns at once when ``out_dir`` holds this source already; the same source gives the same
    ``base_model_digest`` everywhere. Raises ``BaseModelUnreadable`` when ``out_dir`` holds anything else.
    """
    out_dir = Path(out_dir)
    identity = base_model_digest(source) if Path(source).exists() else str(source)
    if out_dir.exists():
        return _require_prepared(out_dir, identity)
    model, tokenizer = load_base_model(source, torch.bfloat16)
    tokenizer.model_max_length = min(tokenizer.model_max_length, model.config.max_position_embeddings)
    partial = out_dir.with_name(f".{out_dir.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with _without_progress_bars():
            model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        _drop_incidental(partial)
        (partial / _SOURCE_NOTE).write_bytes(canonical_json({"source": identity}))
        try:
            partial.rename(out_dir)
        except OSError:  # another process was faster
            return _require_prepared(out_dir, identity)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out_dir


def inspect_base_model(path: str | Path, kind: str = "all", name: str | None = None) -> BaseModelSpec:
    """What a plan needs to know of the model in directory ``path``, without loading its weights.

    Raises ``BaseModelNotFound`` or ``BaseModelUnreadable``, the latter for a GGUF file too.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(path)
    if path.is_file():
        raise BaseModelUnreadable(
            f"the base model {path} is a file; name a directory, as `seqr silo init` and `seqr demo` make one of a "
            "GGUF file"
        )
    digest = base_model_digest(path)
    with _reading(path):
        config = AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    modules = tuple(linear_module_names(model, kind))
    return BaseModelSpec(name or path.resolve().name, digest, modules)


def linear_module_names(model: nn.Module, kind: str) -> list[ModuleSpec]:
    """The Linears that can be adapted, in forward order: ``attention`` only, or ``all`` but the output head.

    For a Llama: q, k, v, o, gate, up, down of each layer. Raises ``BaseModelUnreadable`` if there are none.
    """
    if kind not in ("attention", "all"):
        raise ValueError(f"kind must be 'attention' or 'all', got {kind!r}")
    get_head = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    found = [
        ModuleSpec(name, module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and (kind == "all" or _ATTENTION_PARTS & set(name.split(".")))
    ]
    if not found:
        raise BaseModelUnreadable(f"{type(model).__name__} has no {kind} Linear layers that an adapter could be put on")
    return found


def _locate(path_or_id: str | Path) -> tuple[str, dict[str, str]]:
    path = Path(path_or_id)
    if path.is_file() and path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    # A hub id has the form owner/name; anything else is a path.
    parts = str(path_or_id).split("/")
    if not path.is_dir() and not (len(parts) == 2 and all(parts) and parts[0] not in (".", "..", "~")):
        raise BaseModelNotFound(f"there is no base model at {path_or_id}; give a directory, a .gguf file or a hub id")
    return str(path_or_id), {}


@contextlib.contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BaseModelUnreadable(f"the base model {path} cannot be loaded: {reason[0][:300]}") from error


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_prepared(out_dir: Path, identity: str) -> Path:
    try:
        note = json.loads((out_dir / _SOURCE_NOTE).read_bytes())
    except (OSError, ValueError):
        note = None
    if note != {"source": identity}:
        raise BaseModelUnreadable(f"{out_dir} exists and was not prepared from this source; choose another directory")
    return out_dir


def _drop_incidental(directory: Path) -> None:
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        file = directory / name
        if file.exists():
            settings = {k: v for k, v in json.loads(file.read_bytes()).items() if k not in _INCIDENTAL}
            file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
