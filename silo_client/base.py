"""The base model at this silo: that it is there, that it is the plan's, and its tokenizer without its weights."""

from pathlib import Path
from typing import Any

import torch

from seqr.models import base_model_digest, load_base_model
from seqr.plan import Plan
from silo_client.config import SiloConfig
from silo_client.dataset import Encoder, length_limit
from silo_client.errors import BaseModelMismatch, BaseModelMissing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def require_base_model(config: SiloConfig, plan: Plan | None = None) -> str:
    """The digest of the silo's base model.

    Raises:
        BaseModelMissing: it is not where silo.toml says.
        BaseModelMismatch: it is not the base model of ``plan``.
    """
    path = config.base_model_path
    if not path.exists():
        raise BaseModelMissing(f"there is no base model at {path}; set base_model in silo.toml")
    digest = base_model_digest(path)
    if plan is not None and digest != plan.base_model_digest:
        raise BaseModelMismatch(
            f"the base model at {path} has the digest {digest}, but plan {plan.plan_id} was made for "
            f"{plan.base_model} with {plan.base_model_digest}; install that one"
        )
    return digest


def load_encoder(config: SiloConfig, plan: Plan) -> Encoder:
    """The tokenizer of the base model, with the length that the plan and the model allow; loads no weights."""
    from transformers import AutoConfig, AutoTokenizer

    where, options = _parts(config.base_model_path)
    tokenizer = AutoTokenizer.from_pretrained(where, **options)
    model_config = AutoConfig.from_pretrained(where, **options)
    return Encoder(tokenizer, length_limit(plan.training.max_length, model_config))


def load_model(config: SiloConfig, plan: Plan) -> tuple[Any, int]:
    """The base model in the plan's dtype, ready for training, and its padding token."""
    model, tokenizer = load_base_model(config.base_model_path, DTYPES[plan.dtype])
    model.config.use_cache = False
    return model, int(tokenizer.pad_token_id)


def _parts(path: Path) -> tuple[str, dict[str, str]]:
    return (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (str(path), {})
