"""The whole routed Linear beside the bare one: what routing and the adapter's share cost a layer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from seqr.bench.routing.adapters import random_shelf
from seqr.bench.routing.grid import Say
from seqr.bench.routing.timing import interleave
from seqr.library import Column, Library, ModuleColumn, PermissionRows
from seqr.plan import ModuleSpec, Plan, TrainingLimits
from seqr.routed_linear import RoutedLinear
from seqr.routing.features import gram
from seqr.step import Segment, StepContext, running

# adapters, width, tokens
LAYERS = tuple(
    (adapters, width, tokens) for width in (576, 4096) for adapters in (10, 100, 1_000) for tokens in (1, 32, 512)
)
RANK = 8
# A step is set up once for a whole model; here it is shared by this many Linears, which is fewer than any model has.
DEPTH = 8


def deep_plan(rank: int, width: int) -> Plan:
    """A plan of ``DEPTH`` equal Linears, never signed."""
    return Plan(
        plan_id="bench", federation="bench", base_model="random", base_model_digest="",
        modules=tuple(ModuleSpec(f"linear.{i}", width, width) for i in range(DEPTH)), rank=rank, alpha=2.0 * rank,
        seed=0, dtype="float32", a_digests={}, gateway_keys=(), routing="per_token", calibration="own",
        training=TrainingLimits(), created_at="",
    )  # fmt: skip


def bench_library(adapters: int, rank: int, width: int) -> Library:
    """A real library of ``adapters`` random adapters, each the same in all modules."""
    shelf = random_shelf(adapters, rank)
    generator = torch.Generator().manual_seed(0)
    columns = []
    for i in range(adapters):
        r, mu, sigma = shelf.r[i], float(shelf.mu[i]), float(shelf.sigma[i])
        b_t = torch.randn(rank, width, generator=generator) * 0.01
        part = ModuleColumn((gram(r) / sigma / sigma).to(torch.float32), mu / sigma, b_t, r, mu, sigma)
        columns.append(Column(f"silo-{i:07}", 1, (part,) * DEPTH))
    return Library(deep_plan(rank, width), columns)


class Stack:
    """``DEPTH`` routed Linears over one and the same bare one, all reading the same x, as q, k and v do."""

    def __init__(self, adapters: int, width: int, tokens: int):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(tokens, width, generator=generator)
        self.linear = nn.Linear(width, width, bias=False)
        a = torch.randn(RANK, width, generator=generator) / width**0.5
        self._layers = [RoutedLinear(self.linear, a, index) for index in range(DEPTH)]
        self._rows = PermissionRows(bench_library(adapters, RANK, width))
        self._row = self._rows.row_for(self._rows.library.silos)

    def bare(self) -> None:
        """W x, ``DEPTH`` times."""
        for _ in self._layers:
            self.linear(self.x)

    def routed(self) -> None:
        """One step, and W x with each token's adapter, ``DEPTH`` times."""
        step = StepContext(self._rows, [Segment(self._row, 0, self.x.shape[0], mode="per_token")])
        with running(step):
            for layer in self._layers:
                layer(self.x)


def run_layers(layers: Sequence[tuple[int, int, int]], budget_s: float, say: Say) -> list[dict[str, Any]]:
    """Per (N, n, T): seconds of one bare Linear and of one routed one."""
    out = []
    for adapters, width, tokens in layers:
        say(f"layer: N={adapters}, n={width}, T={tokens}")
        stack = Stack(adapters, width, tokens)
        timings = interleave({"bare": stack.bare, "routed": stack.routed}, budget_s)
        out.append(
            {"adapters": adapters, "width": width, "tokens": tokens, "rank": RANK}
            | {f"{name} seconds": timing.median / DEPTH for name, timing in timings.items()}
        )
    return out
