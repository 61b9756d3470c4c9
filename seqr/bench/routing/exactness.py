"""--exact: the choice against the fp64 oracle on ten million tokens, random ones and ones made to be hard."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from seqr.bench.routing.adapters import Shelf
from seqr.bench.routing.adversary import assorted, cancelled, crossings, oracle, twins
from seqr.bench.routing.grid import Say
from seqr.routing.exact import doubtful
from seqr.routing.per_token import Gate, route, route_activations
from seqr.routing.products import ExactFp32
from seqr.routing.scores import scores

TOKENS = 10_000_000
_AT_ONCE = 1 << 14
_FORBIDDEN = 0.2
Draw = Callable[[int, torch.Generator], torch.Tensor]


@dataclass
class Tally:
    """One kind of tokens. wrong: not the oracle's choice (must be 0); wrong_in_fp32: what fp32 alone gets wrong.

    doubted: looked at twice; below_fp64: tokens whose best two are closer than fp64 itself can tell, where the oracle
    is right by definition only.
    """

    name: str
    tokens: int = 0
    wrong: int = 0
    wrong_in_fp32: int = 0
    doubted: int = 0
    below_fp64: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For the JSON report."""
        return asdict(self)


def run_exactness(say: Say, tokens: int = TOKENS, seed: int = 0) -> list[Tally]:
    """About ``tokens`` tokens over all kinds; in every kind one adapter in eight is NaN and a fifth is forbidden."""
    generator = torch.Generator().manual_seed(seed)
    tallies = []
    for name, share, shelf, draw in kinds(generator):
        say(f"exactness: {name}")
        tallies.append(check(name, shelf, draw, max(1, int(share * tokens)), generator))
    return tallies


def kinds(generator: torch.Generator) -> list[tuple[str, float, Shelf, Draw]]:
    """(name, share of the tokens, adapters, tokens) of each kind; the shares add up to one."""

    def normal(shelf: Shelf) -> Draw:
        return lambda count, dice: torch.randn(count, shelf.r.shape[1], generator=dice)

    def border(shelf: Shelf) -> Draw:
        return lambda count, dice: crossings(shelf, count, dice)

    def null(shelf: Shelf) -> Draw:
        return lambda count, dice: cancelled(shelf, count, dice)

    out: list[tuple[str, float, Shelf, Draw]] = []
    for name, share, rank, condition in (
        ("random, r=8", 0.3, 8, 1e2),
        ("random, r=16", 0.1, 16, 1e2),
        ("random, r=32", 0.02, 32, 1e2),
        ("random, r=8, condition 1e8", 0.1, 8, 1e8),
    ):
        shelf = with_nan(assorted(rank, 16, condition, generator))
        out.append((name, share, shelf, normal(shelf)))
    for gap in (1e-5, 1e-6, 1e-7, 0.0):
        shelf = with_nan(twins(8, 8, gap, 1e2, generator))
        out.append((f"adapters {gap:.0e} apart, r=8" if gap else "equal adapters, r=8", 0.07, shelf, normal(shelf)))
    shelf = with_nan(twins(16, 8, 1e-6, 1e8, generator))
    out.append(("adapters 1e-06 apart, r=16, condition 1e8", 0.03, shelf, normal(shelf)))
    for condition in (1e2, 1e8):
        shelf = assorted(8, 3, condition, generator)
        out.append((f"borders of two adapters, r=8, condition {condition:.0e}", 0.06, shelf, border(shelf)))
    shelf = with_nan(assorted(8, 8, 1e8, generator))
    out.append(("nearly cancelled by one adapter, r=8, condition 1e8", 0.05, shelf, null(shelf)))
    return out


def with_nan(shelf: Shelf) -> Shelf:
    """The same adapters, one in eight of them NaN."""
    r = shelf.r.clone()
    r[5::8, 0, 0] = torch.nan
    return Shelf.of(r, shelf.mu, shelf.sigma)


def check(name: str, shelf: Shelf, draw: Draw, tokens: int, generator: torch.Generator) -> Tally:
    """Route ``tokens`` tokens, a few thousand at a time, and compare each with the oracle."""
    tally = Tally(name)
    while tally.tokens < tokens:
        count = min(_AT_ONCE, tokens - tally.tokens)
        z = draw(count, generator)
        permitted = shelf.everyone(count) & (torch.rand(count, shelf.usable.shape[0], generator=generator) > _FORBIDDEN)
        true, lead = oracle(shelf, z, permitted)
        expected = torch.from_numpy(true)
        with torch.inference_mode(), ExactFp32("cpu"):
            choice = route_activations(z, shelf.columns, Gate(permitted), shelf.truth)
            score = scores(z, shelf.columns.gram, shelf.columns.offset)
            plain = route(score, permitted)
            best, second = score.masked_fill(~permitted, -torch.inf).topk(2).values.unbind(1)
            in_doubt = doubtful(z, best, second, shelf.truth) & permitted.any(1).numpy()
        tally.tokens += count
        tally.wrong += int((choice != expected).sum())
        tally.wrong_in_fp32 += int((plain != expected).sum())
        tally.doubted += int(in_doubt.sum())
        tally.below_fp64 += int((torch.from_numpy(lead) <= _fp64_error(shelf, z)).sum())
    return tally


def _fp64_error(shelf: Shelf, z: torch.Tensor) -> torch.Tensor:
    """fp64 [T]: twice what the oracle's own score may be off by, from its operations' roundings (u = 2^-53)."""
    rank, usable = shelf.r.shape[1], shelf.usable[: shelf.r.shape[0]]
    size = (shelf.r[usable].to(torch.float64).abs().sum((1, 2)) / shelf.sigma[usable]).max()
    offset = (shelf.mu / shelf.sigma)[usable].abs().max()
    longest = z.to(torch.float64).abs().amax(1)
    return 2.0 * 2.0**-53 * ((2 * rank + 4) * size * longest + 3.0 * offset)
