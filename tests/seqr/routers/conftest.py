"""Small pools of adapters, with one A for all or one each, and batches over them."""

from collections.abc import Callable

import pytest
import torch

from seqr.routers.interface import Batch
from seqr.routers.pool import AdapterPool, LoraFactors

MODULES = {"first": (24, 40), "second": (24, 16)}
RANK = 4


def factors(seed: int, shared: bool, rank: int = RANK) -> dict[str, LoraFactors]:
    """One adapter: N(0, 1/r^2) A, from seed 0 when shared, and a B of its own scale."""
    made = {}
    for index, (module, (n, m)) in enumerate(MODULES.items()):
        of_a = torch.Generator().manual_seed(1000 * index + (0 if shared else seed))
        of_b = torch.Generator().manual_seed(7 + 1000 * index + seed)
        scale = 1.0 + (seed * 37 % 10) / 3
        a, b = torch.randn(rank, n, generator=of_a) / rank, torch.randn(m, rank, generator=of_b) * scale
        made[module] = LoraFactors(a, b)
    return made


@pytest.fixture(params=[True, False], ids=["shared A", "unique A"])
def shared(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def make_pool(shared: bool) -> Callable[..., AdapterPool]:
    def make(count: int = 5) -> AdapterPool:
        return AdapterPool({f"adapter-{i}": factors(i + 1, shared) for i in range(count)})

    return make


@pytest.fixture
def pool(make_pool: Callable[..., AdapterPool]) -> AdapterPool:
    return make_pool()


def make_batch(
    adapters: int, lengths: tuple[int, ...] = (6, 4, 1), options: int = 0, permitted: torch.Tensor | None = None
) -> Batch:
    """Sequences of the given lengths, whose last ``options`` tokens are no prompt; everything permitted by default."""
    if permitted is None:
        permitted = torch.ones(len(lengths), adapters, dtype=torch.bool)
    real = torch.tensor(lengths)
    texts = [f"text {index}" for index in range(len(lengths))]
    return Batch(max(lengths), real, (real - options).clamp_min(1), permitted, texts)


def inputs(batch: Batch, seed: int = 3) -> list[torch.Tensor]:
    """x of every module: fp32 [T, n]."""
    generator = torch.Generator().manual_seed(seed)
    count = batch.sequence.shape[0]
    return [torch.randn(count, n, generator=generator) for n, _ in MODULES.values()]
