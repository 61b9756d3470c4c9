"""Routed decode and prefill against the bare layers, under CUDA graphs."""

from dataclasses import dataclass

import torch

from benchmarks.gpu.adapters import random_permissions, random_site
from benchmarks.gpu.layers import Layer, Shapes, Stack
from benchmarks.gpu.timing import Run, captured, interleaved
from seqr.kernels.evidence_prefill import Chunks
from seqr.kernels.step import Batch, DeviceStep, running
from seqr.kernels.tables import SiteTables

MODES = ("per_token", "evidence", "prompt_evidence")
BARS = {16: 0.90, 64: 0.88, 1024: 0.82}
PREFILL_BAR = 0.90


@dataclass(frozen=True)
class Result:
    what: str
    adapters: int
    mode: str
    how: str
    milliseconds: float
    ratio: float
    bar: float | None

    def row(self) -> str:
        verdict = "" if self.bar is None else ("PASS" if self.ratio >= self.bar else "FAIL")
        bar = "" if self.bar is None else f"{self.bar:.2f}"
        return (
            f"{self.what:18} {self.adapters:6} {self.mode:16} {self.how:9} {self.milliseconds:9.4f} ms "
            f"{self.ratio:6.3f} {bar:5} {verdict}"
        )


def tables_for(shapes: Shapes, adapters: int, device: torch.device) -> list[SiteTables]:
    """Tables of each layer's two sites."""
    both = [shapes.qkv, (shapes.hidden,)]
    return [random_site(outputs, adapters, shapes.rank, device) for _ in range(shapes.layers) for outputs in both]


def step_for(
    mode: str, tables: list[SiteTables], adapters: int, tokens: int, runs: bool, device: torch.device
) -> DeviceStep:
    """One token of each of T sequences, or with ``runs`` one sequence of T tokens; each may use half the adapters."""
    width, modules = tables[0].adapters, sum(table.modules for table in tables)
    bits, row = random_permissions(adapters, width, tokens, device)
    slots = 1 if runs else tokens
    slot = torch.zeros(tokens, dtype=torch.int32) if runs else torch.arange(tokens, dtype=torch.int32)
    flag = torch.full((tokens,), mode == "evidence", device=device)
    column = torch.randint(0, adapters, (tokens,), dtype=torch.int32)
    if runs:
        column[:] = column[0]
        row[:] = row[0]
    batch = Batch(
        row,
        slot.to(device),
        flag.to(torch.int8),
        flag,
        torch.full_like(flag, mode == "prompt_evidence"),
        column.to(device),
    )
    sums = torch.zeros(modules, slots + 1, width, dtype=torch.float64, device=device) if mode == "evidence" else None
    chunks = Chunks.of([tokens], [0], device) if runs else None
    return DeviceStep(tables, bits, batch, frozenset({mode}), sums, chunks)


def measure(
    what: str, shapes: Shapes, layers: list[Layer], tokens: int, context: int, libraries: tuple[int, ...],
    device: torch.device, rounds: int, repeat: int, judged: bool,
) -> list[Result]:  # fmt: skip
    """Every mode and way for every N, interleaved with the bare layers. ``context`` 0: a prefill of ``tokens``."""
    results = []
    stack = Stack(layers, tokens, context, device)
    for adapters in libraries:
        tables = tables_for(shapes, adapters, device)
        runs: dict[str, Run] = {"bare": captured(lambda: stack.run("bare"), device)}
        kept = []
        for mode in MODES:
            step = step_for(mode, tables, adapters, tokens, context == 0, device)
            kept.append(step)
            for how in ("plain", "overlap", "stacked"):
                if how == "overlap" and mode == "prompt_evidence":
                    continue

                def routed(how: str = how, step: DeviceStep = step) -> torch.Tensor:
                    with running(step):
                        return stack.run(how)

                runs[f"{mode} {how}"] = captured(routed, device)
        times = interleaved(runs, device, rounds, repeat)
        results.append(Result(what, adapters, "bare", "-", times["bare"], 1.0, None))
        for mode in MODES:
            ways = {name.split()[1]: t for name, t in times.items() if name.startswith(mode + " ")}
            best = min(ways, key=ways.__getitem__)
            for how, taken in ways.items():
                bar = (BARS.get(adapters) if context else PREFILL_BAR) if judged and how == best else None
                results.append(Result(what, adapters, mode, how, taken, times["bare"] / taken, bar))
        del runs, kept, tables
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return results
