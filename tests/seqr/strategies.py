"""Plans, adapters and models small enough for a test, and made to order."""

from collections.abc import Sequence

import torch
from torch import nn

from seqr.adapter import Adapter, ModuleAdapter
from seqr.calibration import norms
from seqr.factorize import factorize
from seqr.library import Library
from seqr.plan import GatewayKey, ModuleSpec, Plan, TrainingLimits
from seqr.shared_a import draw_a


def toy_plan(
    modules: Sequence[tuple[str, int, int]] = (("first", 24, 40), ("second", 40, 24), ("third", 24, 16)),
    rank: int = 4,
    calibration: str = "own",
) -> Plan:
    """A plan that was never signed: (name, in, out) per module."""
    return Plan(
        plan_id="plan-0123456789abcdef",
        federation="toy",
        base_model="toy",
        base_model_digest="sha256:" + "0" * 64,
        modules=tuple(ModuleSpec(*module) for module in modules),
        rank=rank,
        alpha=2.0 * rank,
        seed=1,
        dtype="float32",
        a_digests={name: "0" * 64 for name, _, _ in modules},
        gateway_keys=(GatewayKey("key", "sealing", "signing"),),
        routing="evidence",
        calibration=calibration,
        training=TrainingLimits(),
        created_at="2026-01-01T00:00:00Z",
    )


def shared_a(plan: Plan) -> dict[str, torch.Tensor]:
    """A of every module of ``plan``."""
    return {spec.name: draw_a(plan.seed, spec.name, plan.rank, spec.in_features) for spec in plan.modules}


def toy_adapter(plan: Plan, seed: int, condition: float = 10.0) -> Adapter:
    """A random adapter whose B has the given condition number, calibrated on normal x."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for spec in plan.modules:
        left = torch.linalg.qr(torch.randn(spec.out_features, plan.rank, generator=generator, dtype=torch.float64))[0]
        right = torch.linalg.qr(torch.randn(plan.rank, plan.rank, generator=generator, dtype=torch.float64))[0]
        b = (left * torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), plan.rank).double()) @ right
        q, r = factorize(b.float(), plan.scale)
        x = torch.randn(400, spec.in_features, generator=generator)
        values = norms(r, x @ draw_a(plan.seed, spec.name, plan.rank, spec.in_features).T)
        modules[spec.name] = ModuleAdapter(q, r, float(values.mean()), float(values.std()))
    return Adapter(modules)


def toy_library(plan: Plan, silos: Sequence[str], condition: float = 10.0) -> Library:
    """One random adapter per silo, the same for the same name whoever else is there."""
    library = Library.empty(plan)
    for silo in silos:
        library = library.add(silo, 1, toy_adapter(plan, seed=sum(silo.encode()) * 7919, condition=condition))
    return library


def broken(adapter: Adapter, part: str, value: float = float("nan")) -> Adapter:
    """``adapter`` with one value of ``part`` (q, r, mu or sigma) replaced in every module."""
    modules = {}
    for name, module in adapter.modules.items():
        parts = {"q": module.q.clone(), "r": module.r.clone(), "mu": module.mu, "sigma": module.sigma}
        if part in ("q", "r"):
            parts[part][0, 0] = value  # type: ignore[index]
        else:
            parts[part] = value
        modules[name] = ModuleAdapter(**parts)  # type: ignore[arg-type]
    return Adapter(modules)


class ToyModel(nn.Module):
    """The plan's Linears one after another, so that what an early one adds reaches the later ones."""

    def __init__(self, plan: Plan, dtype: torch.dtype = torch.float32, bias: bool = True):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for spec in plan.modules:
            linear = nn.Linear(spec.in_features, spec.out_features, bias=bias, dtype=dtype)
            with torch.no_grad():
                linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) / spec.in_features**0.5)
            self.add_module(spec.name, linear)
        self.order = [spec.name for spec in plan.modules]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.order:
            x = torch.tanh(self.get_submodule(name)(x))
        return x
