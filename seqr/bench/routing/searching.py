"""Search against the full product at N = 100,000, on adapters built around trained ones and on random ones."""

import time
from typing import Any

import torch

from seqr.bench.routing.adapters import Shelf, random_shelf
from seqr.bench.routing.grid import Say
from seqr.bench.routing.timing import interleave
from seqr.bench.routing.trained import expand, train_seeds
from seqr.routing.features import features
from seqr.routing.per_token import Gate, route_activations
from seqr.routing.products import ExactFp32
from seqr.routing.search import SearchIndex

ADAPTERS = 100_000
CASES: tuple[tuple[str, int], ...] = (("trained", 8), ("trained", 16), ("trained", 32), ("random", 8))
TOKENS = (1, 32)
_SAMPLE = 1024


def run_search(
    cases: tuple[tuple[str, int], ...], adapters: int, tokens: tuple[int, ...], budget_s: float, say: Say
) -> list[dict[str, Any]]:
    """Per kind, rank and T: seconds from z of the full product (two forms) and of search, and the leaves it opened."""
    out = []
    for kind, rank in cases:
        say(f"search: {kind} adapters, N={adapters}, r={rank}")
        shelf, sample, z = _trained(adapters, rank) if kind == "trained" else _random(adapters, rank)
        start = time.perf_counter()
        index = SearchIndex.build(shelf.truth, shelf.usable, sample)
        built = time.perf_counter() - start
        for count in tokens:
            row = {"adapters": "built around trained ones" if kind == "trained" else kind, "N": adapters, "rank": rank}
            out.append(row | {"tokens": count, "build seconds": built} | _compare(shelf, index, z[:count], budget_s))
    return out


def _compare(shelf: Shelf, index: SearchIndex, z: torch.Tensor, budget_s: float) -> dict[str, Any]:
    permitted = shelf.everyone(z.shape[0])
    gate, allowed = Gate(permitted), index.allow(permitted)
    flat = shelf.columns.gram.transpose(1, 2).flatten(0, 1).T.contiguous()
    offset = shelf.columns.offset.nan_to_num(torch.inf)
    ceiling = torch.full(permitted.shape, -torch.inf).masked_fill_(permitted, torch.inf)

    def full() -> torch.Tensor:
        return route_activations(z, shelf.columns, gate, shelf.truth)

    def one_product() -> torch.Tensor:
        score = (features(z) @ flat).clamp_min_(2.0**-100).sqrt_().sub_(offset).clamp_max_(ceiling)
        blocks = score.view(z.shape[0], -1, 64)
        which = blocks.amax(2).argmax(1)
        return which * 64 + blocks[torch.arange(z.shape[0]), which].argmax(1)

    def search() -> torch.Tensor:
        return index.route(z, allowed)

    with torch.inference_mode(), ExactFp32("cpu"):
        exact = full()
        agree = bool(torch.equal(search(), exact))
        best = (features(z) @ flat).clamp_min_(0.0).sqrt_().sub_(offset).amax(1)
        opened = float((index.bounds(z) >= best[:, None]).float().mean())
        timings = interleave(
            {"full, exact": full, "full, one product, not exact": one_product, "search": search}, budget_s
        )
    seconds = {name: timing.median for name, timing in timings.items()}
    return {"seconds": seconds, "leaves opened": opened, "same choices as full, exact": agree}


def _trained(adapters: int, rank: int) -> tuple[Shelf, torch.Tensor, torch.Tensor]:
    seeds = train_seeds(rank)
    sample = seeds.calibration[:_SAMPLE]
    return Shelf.calibrated(expand(seeds, adapters), sample[:512]), sample, seeds.tokens


def _random(adapters: int, rank: int) -> tuple[Shelf, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sample, z = (torch.randn(count, rank, generator=generator) for count in (_SAMPLE, max(TOKENS)))
    return random_shelf(adapters, rank), sample, z
