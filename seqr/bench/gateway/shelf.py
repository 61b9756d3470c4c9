"""The libraries that engines are measured with: random B of the norm of trained ones, calibrated on the public text.

Speed does not depend on the values of B, only on their number, shapes and places in memory, so nothing is trained.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from seqr.adapter import Adapter, ModuleAdapter
from seqr.calibration import norms
from seqr.factorize import factorize
from seqr.keys import SealingKey, SigningKey
from seqr.library import Column, ModuleColumn
from seqr.models import base_model_digest, linear_module_names
from seqr.plan import GatewayKey, ModuleSpec, Plan, create_plan
from seqr.public_calibration import collect_z
from seqr.public_text import calibration_texts
from seqr.routing.features import gram
from seqr.shared_a import verify_a

# ||s B||_F of the adapters that `seqr bench paper` trains on SmolLM2-135M is 2.6 to 3.0 in Linears of 576 outputs and
# 1.4 to 1.8 in those of 192: this times the root of the outputs.
NORM = 0.12


def silo_name(index: int) -> str:
    """The silo of the adapter number ``index``; names sort as numbers do."""
    return f"silo{index:05d}"


def bench_plan(path: Path, model: torch.nn.Module, rank: int, dtype: str, key: GatewayKey | None = None) -> Plan:
    """A plan over all attention Linears of the model at ``path``."""
    return create_plan(
        federation="bench",
        base_model=path.name,
        base_model_digest=base_model_digest(path),
        modules=linear_module_names(model, "attention"),
        rank=rank,
        alpha=2.0 * rank,
        seed=1,
        dtype=dtype,
        gateway_keys=[key or GatewayKey.of(SealingKey.generate().public, SigningKey.generate().public)],
    )


def random_b(spec: ModuleSpec, rank: int, generator: torch.Generator) -> torch.Tensor:
    """s B fp32 [m, r] of the norm of a trained one."""
    b = torch.randn(spec.out_features, rank, generator=generator)
    return b.mul_(NORM * float(spec.out_features) ** 0.5 / float(b.norm()))


def random_adapter(plan: Plan, index: int) -> Adapter:
    """The adapter number ``index`` as a silo would deliver it."""
    generator = torch.Generator().manual_seed(index)
    modules = {}
    for spec in plan.modules:
        q, r = factorize(random_b(spec, plan.rank, generator), 1.0)
        modules[spec.name] = ModuleAdapter(q, r, 1.0, 1.0)
    return Adapter(modules)


def speech(model: torch.nn.Module, tokenizer: Any, plan: Plan) -> dict[str, torch.Tensor]:
    """z of the public text, as much of it as tells one adapter's norms from another's: fp32 [at most 512, r]."""
    z = collect_z(model, calibration_texts(tokenizer)[:32], plan, verify_a(plan))
    return {name: part[:512] for name, part in z.items()}


def random_columns(
    plan: Plan, count: int, z: Mapping[str, torch.Tensor], device: torch.device | str = "cpu"
) -> list[Column]:
    """``count`` adapters as a library on ``device`` holds them, each with tensors of its own; z: see ``speech``."""
    return list(_columns(plan, count, z, device))


def _columns(plan: Plan, count: int, z: Mapping[str, torch.Tensor], device: torch.device | str) -> Iterator[Column]:
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        parts = tuple(_part(random_b(spec, plan.rank, generator), z[spec.name], device) for spec in plan.modules)
        yield Column(silo_name(index), 1, parts)


def _part(b: torch.Tensor, z: torch.Tensor, device: torch.device | str) -> ModuleColumn:
    r = torch.linalg.qr(b, mode="r").R
    r = (torch.where(r.diagonal() < 0, -1.0, 1.0)[:, None] * r).triu()
    heard = norms(r, z)
    mu, sigma = float(heard.mean()), float(heard.std(correction=0))
    wide = r.to(torch.float64)
    b_t = b.T.contiguous().to(device)
    return ModuleColumn((gram(wide) / sigma / sigma).to(torch.float32), mu / sigma, b_t, r, mu, sigma)


def prompts(streams: int, length: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Token ids that are never special ones and differ from stream to stream."""
    lowest = min(100, vocabulary // 4)
    span = max(1, vocabulary - lowest - 1)
    return [tuple(lowest + (7 * row + 13 * place) % span for place in range(length)) for row in range(streams)]
