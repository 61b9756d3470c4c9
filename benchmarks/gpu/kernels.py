"""Where the time goes: each kernel alone, twenty in a row in one graph, and the timeline of whole routed graphs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.gpu.layers import Layer, Shapes, Stack
from benchmarks.gpu.serving import step_for, tables_for
from benchmarks.gpu.timing import captured, interleaved
from seqr.kernels.evidence_decode import route_evidence
from seqr.kernels.evidence_prefill import route_evidence_runs
from seqr.kernels.expand import expand_groups, expand_tokens
from seqr.kernels.group import group
from seqr.kernels.project import Projection, add_parts, project
from seqr.kernels.route import route_tokens
from seqr.kernels.routed_site import GATHER_TOKENS
from seqr.kernels.step import DeviceStep, running


@dataclass(frozen=True)
class Launch:
    """One kernel of a graph's replay: microseconds from the replay's first kernel, and how long it ran."""

    name: str
    start: float
    duration: float


def alone(
    shapes: Shapes, tokens: int, prefill: bool, adapters: int, device: torch.device, in_a_row: int, rounds: int
) -> dict[str, float]:
    """Microseconds per call at the site of q, k and v, gaps between kernels included; caches are warm."""
    step = step_for("evidence", tables_for(shapes, adapters, device)[:1], adapters, tokens, prefill, device)
    tables, batch, sums = step.tables[0], step.batch, step.sums
    assert sums is not None
    outputs = sum(shapes.qkv)
    x = torch.randn(tokens, shapes.hidden, dtype=torch.bfloat16, device=device)
    weight = torch.randn(outputs, shapes.hidden, dtype=torch.bfloat16, device=device)
    a = Projection.of(torch.randn(tables.modules * shapes.rank, shapes.hidden, device=device) / shapes.hidden**0.5)
    y = torch.zeros(tokens, outputs, dtype=torch.bfloat16, device=device)
    value = torch.zeros(tokens, tables.adapters, dtype=torch.float64, device=device)
    z = project(x, a)
    found, whole = route_tokens(z, tables, step.bits, batch.row)
    choice = found.choice()
    calls: dict[str, Callable[[], object]] = {
        "W x": lambda: F.linear(x, weight),
        "project": lambda: project(x, a),
        "route_tokens": lambda: route_tokens(z, tables, step.bits, batch.row),
        "choice": lambda: found.choice(choice),
    }
    if step.chunks is None:
        calls["route_evidence"] = lambda: route_evidence(
            z, tables, step.bits, batch.row, batch.slot, batch.counts, sums, value, False
        )
    else:
        chunks, one = step.chunks, add_parts(z)
        calls["route_evidence_runs"] = lambda: route_evidence_runs(
            one, tables, step.bits, batch.row, chunks, batch.counts, sums, value, False
        )
    if tokens <= GATHER_TOKENS:
        calls["expand_tokens"] = lambda: expand_tokens(y, whole, tables, found)
    else:
        groups = group(choice, tables.adapters)
        calls["group"] = lambda: group(choice, tables.adapters)
        calls["expand_groups"] = lambda: expand_groups(y, whole, tables, groups)

    def repeated(call: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(in_a_row):
                call()

        return run

    runs = {name: captured(repeated(call), device) for name, call in calls.items()}
    return {name: 1e3 * taken / in_a_row for name, taken in interleaved(runs, device, rounds).items()}


def timeline(stack: Stack, step: DeviceStep, how: str, device: torch.device) -> list[Launch]:
    """Every kernel of one replay of the routed layers, in the order of their starts."""

    def routed() -> torch.Tensor:
        with running(step):
            return stack.run(how)

    replay = captured(routed, device)
    if device.type != "cuda":
        replay()
        return []
    for _ in range(3):
        replay()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        replay()
        torch.cuda.synchronize()
    ran = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    ran = sorted((e for e in ran if e.time_range.elapsed_us() > 0), key=lambda e: e.time_range.start)
    first = ran[0].time_range.start
    return [Launch(e.name, e.time_range.start - first, e.time_range.elapsed_us()) for e in ran]


def timelines(
    shapes: Shapes, layers: list[Layer], tokens: int, context: int, adapters: int, device: torch.device
) -> dict[str, list[Launch]]:
    """Per "mode way": the timeline of that graph, and of the bare layers."""
    stack, tables = Stack(layers, tokens, context, device), tables_for(shapes, adapters, device)
    found = {}
    for mode, how in (("per_token", "bare"), ("per_token", "plain"), ("per_token", "overlap"), ("evidence", "overlap")):
        step = step_for(mode, tables, adapters, tokens, context == 0, device)
        found["bare" if how == "bare" else f"{mode} {how}"] = timeline(stack, step, how, device)
    return found


def summary(launches: list[Launch]) -> str:
    """Per kernel name: how often, and its mean microseconds, the most time first."""
    of: dict[str, list[float]] = {}
    for launch in launches:
        of.setdefault(launch.name, []).append(launch.duration)
    rows = sorted(of.items(), key=lambda item: -sum(item[1]))
    return "; ".join(f"{len(t)} x {name[:40]} {sum(t) / len(t):.1f}" for name, t in rows[:14])


def middle_layer(launches: list[Launch], layers: int) -> str:
    """The launches of the second layer, as start+duration, by their share of the graph's time."""
    if not launches:
        return ""
    end = max(launch.start + launch.duration for launch in launches)
    low, high = end / layers, 2 * end / layers
    part = [launch for launch in launches if low <= launch.start < high]
    return " | ".join(f"{launch.start - low:.1f}+{launch.duration:.1f} {launch.name[:24]}" for launch in part)
