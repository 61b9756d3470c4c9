"""The grid: every method in every cell, or the reason why it is not there."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any

import torch

from seqr.bench.machine import free_memory
from seqr.bench.routing.adapters import Shelf, random_shelf
from seqr.bench.routing.methods import METHODS, Cell, flops, prepare, temporary_bytes, weight_bytes
from seqr.bench.routing.timing import interleave, peak_bytes

ADAPTERS = (10, 100, 1_000, 10_000, 100_000)
RANKS = (8, 16, 32)
WIDTHS = (576, 4096)
TOKENS = (1, 32, 512)
BAR_CELL = Cell(1_000, 8, 4_096, 64)
# Below this, no method here runs on one core of the last ten years: for foreseeing what would take too long.
_FLOPS_PER_S = 2e10
Say = Callable[[str], None]


@dataclass
class Result:
    """One cell. methods: per method its seconds, FLOPs and bytes; skipped: per method why it did not run."""

    cell: Cell
    methods: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    agree: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For the JSON report."""
        return {
            **asdict(self.cell),
            "methods": self.methods,
            "skipped": self.skipped,
            "share equal to exact": self.agree,
        }


def cells(
    adapters: Iterable[int] = ADAPTERS,
    ranks: Iterable[int] = RANKS,
    widths: Iterable[int] = WIDTHS,
    tokens: Iterable[int] = TOKENS,
) -> list[Cell]:
    """All combinations, those of one library together."""
    return [Cell(n, r, w, t) for n, r, w, t in product(adapters, ranks, widths, tokens)]


def run_grid(points: Sequence[Cell], cell_s: float, say: Say) -> list[Result]:
    """Measure ``points`` in turn, about ``cell_s`` seconds each; neighbours share a library where they can."""
    results, shelf = [], None
    for number, cell in enumerate(points, start=1):
        if shelf is None or (shelf.r.shape[0], shelf.r.shape[1]) != (cell.adapters, cell.rank):
            shelf = None
            shelf = random_shelf(cell.adapters, cell.rank)
        say(f"[{number}/{len(points)}] {cell}")
        results.append(run_cell(cell, shelf, cell_s))
    return results


def run_cell(cell: Cell, shelf: Shelf, cell_s: float, methods: Sequence[str] = METHODS) -> Result:
    """All ``methods`` in one cell, interleaved, on normal x and with every adapter permitted through the mask."""
    result = Result(cell)
    generator = torch.Generator().manual_seed(cell.tokens)
    a = torch.randn(cell.rank, cell.width, generator=generator) / cell.width**0.5
    x = torch.randn(cell.tokens, cell.width, generator=generator)
    permitted = shelf.everyone(cell.tokens)
    prepared = {}
    for name in methods:
        reason = _reason_to_skip(name, cell, cell_s)
        if reason:
            result.skipped[name] = reason
        else:
            prepared[name] = prepare(name, cell, shelf, a, x, permitted)
    with torch.inference_mode():
        choices = {name: method.run() for name, method in prepared.items()}
    if "ours, exact" in choices:
        result.agree = {
            name: float((choice == choices["ours, exact"]).float().mean()) for name, choice in choices.items()
        }
    timings = interleave({name: method.run for name, method in prepared.items()}, cell_s)
    for name, method in prepared.items():
        timing = timings[name]
        result.methods[name] = {
            "seconds": timing.median,
            "seconds, lower quartile": timing.low,
            "seconds, upper quartile": timing.high,
            "samples": timing.samples,
            "flops": flops(name, cell),
            "weight bytes": method.weight_bytes,
            "temporary bytes": peak_bytes(method.run),
        }
    return result


def _reason_to_skip(method: str, cell: Cell, cell_s: float) -> str:
    needed, free = weight_bytes(method, cell) * 2 + temporary_bytes(method, cell), free_memory() // 2
    if needed > free:
        return f"needs {needed / 2**30:.1f} GiB to set up, {free / 2**30:.1f} may be used"
    foreseen = flops(method, cell) / _FLOPS_PER_S
    # A round is two calls of each, and there are at least five rounds.
    if foreseen * 10 > cell_s:
        return f"would take about {foreseen:.1f} s a call, and a cell has {cell_s:.0f} s"
    return ""
