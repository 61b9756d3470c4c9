"""``seqr bench routing``: which sections to run, and where the report goes."""

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from seqr.bench.machine import describe_machine
from seqr.bench.routing.adapters import random_shelf
from seqr.bench.routing.exactness import TOKENS as EXACT_TOKENS
from seqr.bench.routing.exactness import run_exactness
from seqr.bench.routing.grid import BAR_CELL, Say, cells, run_cell, run_grid
from seqr.bench.routing.layer import LAYERS, run_layers
from seqr.bench.routing.memory import run_memory
from seqr.bench.routing.methods import METHODS
from seqr.bench.routing.peft_arrow import PEERS, PeftMissing, run_peers
from seqr.bench.routing.report import write_report
from seqr.bench.routing.searching import ADAPTERS, CASES, TOKENS, run_search
from seqr.errors import SeqrError

_QUICK_EXACT_TOKENS = 100_000
_LEAST_CELL_S, _MOST_CELL_S = 0.1, 600.0


class BenchRefused(SeqrError):
    """Options that ask for what this benchmark cannot do."""

    code = "bench_refused"


def routing(
    out: Annotated[Path, typer.Option(help="Where routing.json and routing.md go.")] = Path("bench-routing"),
    quick: Annotated[bool, typer.Option("--quick", help="A small grid, in less than a minute.")] = False,
    speed: Annotated[bool, typer.Option("--speed", help="Bars, grid, layers, peft and search: the default.")] = False,
    exact: Annotated[bool, typer.Option("--exact", help="Ten million tokens against an fp64 oracle.")] = False,
    memory: Annotated[bool, typer.Option("--memory", help="The largest library beside an 8B model.")] = False,
    cell_seconds: Annotated[float, typer.Option(help="How long each cell of the grid is measured.")] = 3.0,
    exact_tokens: Annotated[int, typer.Option(help="How many tokens --exact checks.")] = EXACT_TOKENS,
    device: Annotated[str, typer.Option(help="cpu; the grid on cuda is that of the kernels.")] = "cpu",
) -> None:
    """Every routing method on the same adapters: time, FLOPs, bytes; exactness; search; memory."""
    check_options(cell_seconds, exact_tokens, device)
    start, say = time.perf_counter(), _say
    report: dict[str, Any] = {"machine": describe_machine(), "quick": quick, "notes": []}
    if speed or not (exact or memory):
        report |= run_speed(quick, cell_seconds, report["notes"], say)
    if exact:
        tokens = min(exact_tokens, _QUICK_EXACT_TOKENS) if quick else exact_tokens
        report["exactness"] = [tally.as_dict() for tally in run_exactness(say, tokens)]
    if memory:
        report["memory"] = run_memory()
    flags = {"--quick": quick, "--speed": speed, "--exact": exact, "--memory": memory}
    report["command"] = " ".join(["seqr bench routing", *(flag for flag, given in flags.items() if given)])
    report["seconds"] = time.perf_counter() - start
    for path in write_report(report, out):
        typer.echo(str(path))
    wrong = sum(tally["wrong"] for tally in report.get("exactness", []))
    if wrong:
        raise typer.Exit(1)


def check_options(cell_seconds: float, exact_tokens: int, device: str) -> None:
    """Raises ``BenchRefused``."""
    if not _LEAST_CELL_S <= cell_seconds <= _MOST_CELL_S:
        raise BenchRefused(
            f"--cell-seconds must be between {_LEAST_CELL_S:g} and {_MOST_CELL_S:g}, got {cell_seconds:g}"
        )
    if exact_tokens < 1:
        raise BenchRefused(f"--exact-tokens must be at least 1, got {exact_tokens}")
    if device not in ("cpu", "cuda"):
        raise BenchRefused(f"--device must be cpu or cuda, got {device}")
    if device == "cuda" and not torch.cuda.is_available():
        raise BenchRefused("--device cuda: torch finds no CUDA device on this machine; leave it out for the CPU")
    if device == "cuda":
        raise BenchRefused("--device cuda: this command measures the CPU; the kernels have a benchmark of their own")


def run_speed(quick: bool, cell_s: float, notes: list[str], say: Say) -> dict[str, Any]:
    """Bars, grid, layers, peers and search; what could not be measured is added to ``notes``."""
    say(f"bars: {BAR_CELL}")
    shelf = random_shelf(BAR_CELL.adapters, BAR_CELL.rank)
    # A second a call of naive would leave the others too few rounds; the grid has it.
    bars = run_cell(BAR_CELL, shelf, 6.0 if quick else 10 * cell_s, METHODS[1:])
    report: dict[str, Any] = {"bars": bars.as_dict()}
    points, layers, peers, cases, adapters = cells(), LAYERS, PEERS, CASES, ADAPTERS
    if quick:
        points, cell_s, layers, peers = cells((10, 1_000), (8,), (576,), (1, 32)), 0.5, LAYERS[3:5], PEERS[:1]
        cases, adapters = CASES[-1:], 4_000
        notes.append("search on trained adapters and at N=100,000, and most of the grid: --quick leaves them out")
    report["grid"] = [result.as_dict() for result in run_grid(points, cell_s, say)]
    report["layers"] = run_layers(layers, cell_s / 2, say)
    try:
        report["peers"] = run_peers(peers, cell_s / 2, say)
    except PeftMissing as missing:
        notes.append(str(missing))
    report["search"] = run_search(cases, adapters, TOKENS, cell_s, say)
    return report


def _say(line: str) -> None:
    typer.echo(line, err=True)
