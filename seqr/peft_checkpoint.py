"""LoRA checkpoints as peft writes them, in and out: ``adapter_config.json`` beside ``adapter_model.safetensors``."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from seqr.errors import SeqrError
from seqr.routers.pool import Factors, LoraFactors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What would change the update b a in a way that two factors do not say.
_UNSUPPORTED = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "trainable_token_indices", "use_bdlora")


class CheckpointUnreadable(SeqrError):
    """A directory that is no LoRA checkpoint, or one of a kind that is not a plain product of two factors."""

    code = "checkpoint_unreadable"


class CheckpointExists(SeqrError):
    """A checkpoint was to be written where there is something already."""

    code = "checkpoint_exists"


def read_checkpoint(directory: Path) -> dict[str, LoraFactors]:
    """A peft LoRA checkpoint: a fp32 [r, n] and b fp32 [m, r] per module, the LoRA scale folded into b.

    Only safetensors are read. Raises ``CheckpointUnreadable``.
    """
    config = _config(directory)
    try:
        tensors = load_file(directory / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointUnreadable(f"{directory / WEIGHTS} cannot be read as safetensors: {error}") from error
    rank = int(config["r"])
    scale = float(config["lora_alpha"]) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        if part not in ("lora_A", "lora_B"):
            raise CheckpointUnreadable(f"{directory} holds {name}, which is neither lora_A nor lora_B of a Linear")
        found.setdefault(module, {})[part] = tensor.to(torch.float32)
    if not found:
        raise CheckpointUnreadable(f"{directory} adapts no module")
    factors = {}
    for module, parts in found.items():
        if len(parts) != 2:
            raise CheckpointUnreadable(f"{directory} has only {next(iter(parts))} for module {module}")
        a, b = parts["lora_A"], parts["lora_B"]
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != rank or b.shape[1] != rank:
            shapes = f"A {tuple(a.shape)} and B {tuple(b.shape)}"
            raise CheckpointUnreadable(f"{directory} has {shapes} in {module}, which is not rank {rank}")
        factors[module] = LoraFactors(a.contiguous(), (b * scale).contiguous())
    return factors


def write_checkpoint(factors: Factors, directory: Path, base_model: str = "") -> None:
    """Write what ``peft.PeftModel.from_pretrained`` loads; its LoRA scale is 1, since b has it already.

    base_model: the name or path that peft shall note. Raises ``CheckpointExists``.
    """
    if directory.exists() and any(directory.iterdir()):
        raise CheckpointExists(f"{directory} is not empty; choose a new directory for the checkpoint")
    directory.mkdir(parents=True, exist_ok=True)
    rank = next(iter(factors.values())).a.shape[0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(factors),
        "base_model_name_or_path": base_model,
        "inference_mode": True,
    }
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {}
    for module, one in factors.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = one.a.to(torch.float32).contiguous()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = one.b.to(torch.float32).contiguous()
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def _config(directory: Path) -> Mapping[str, Any]:
    try:
        config = json.loads((directory / CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointUnreadable(f"{directory / CONFIG} cannot be read; give a directory that peft saved") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA" or "r" not in config:
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise CheckpointUnreadable(f"{directory} holds an adapter of type {kind}, not LORA")
    for key in _UNSUPPORTED:
        if config.get(key):
            raise CheckpointUnreadable(f"{directory} uses {key}, which two factors per module cannot express")
    if config.get("bias", "none") != "none":
        raise CheckpointUnreadable(f"{directory} trains biases, which two factors per module cannot express")
    return config
