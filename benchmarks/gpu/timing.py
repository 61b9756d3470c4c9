"""Medians of interleaved runs: device events and captured graphs on a GPU, the host's clock otherwise."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Run = Callable[[], object]


@dataclass(frozen=True)
class Replay:
    """A captured graph with what it ran: a graph holds addresses, so that ``run``'s tensors must live as long."""

    graph: torch.cuda.CUDAGraph
    run: Run

    def __call__(self) -> None:
        self.graph.replay()


def captured(run: Run, device: torch.device) -> Run:
    """``run`` as a CUDA graph's replay, after three warm-up runs; on a CPU ``run`` itself."""
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return Replay(graph, run)


def interleaved(runs: Mapping[str, Run], device: torch.device, rounds: int, repeat: int = 1) -> dict[str, float]:
    """Median milliseconds of each run over ``rounds`` rounds, all of them in every round, ``repeat`` times in a row."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    warm_up = device.type == "cuda"
    for turn in range(rounds + warm_up):
        for name, run in runs.items():
            taken = _once(run, device, repeat)
            if turn or not warm_up:
                times[name].append(taken / repeat)
    return {name: statistics.median(taken) for name, taken in times.items()}


def _once(run: Run, device: torch.device, repeat: int) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeat):
            run()
        return 1e3 * (time.perf_counter() - start)
    start_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start_event.record()
    for _ in range(repeat):
        run()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event)
