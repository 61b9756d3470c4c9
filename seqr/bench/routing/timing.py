"""Time and memory of functions side by side: interleaved, so that what disturbs one disturbs all."""

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_SAMPLE_S = 2e-3
_MAX_REPEATS = 10


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median and the quartiles of ``samples`` samples."""

    median: float
    low: float
    high: float
    samples: int


def interleave(
    functions: Mapping[str, Callable[[], Any]], budget_s: float, least: int = 5, most: int = 60
) -> dict[str, Timing]:
    """Call every function once a round, in turn, for about ``budget_s`` seconds, ``least`` rounds and ``most``.

    A sample is the mean of as many calls in a row as fill two milliseconds (at most ten), after one that is not timed:
    each function finds its own data in the cache, none finds another's.
    """
    repeats, once = {}, 0.0
    with torch.inference_mode():
        for name, function in functions.items():
            function()
            start = time.perf_counter()
            function()
            took = time.perf_counter() - start
            repeats[name] = max(1, min(_MAX_REPEATS, int(_SAMPLE_S / max(took, 1e-9))))
            once += took * (1 + repeats[name])
        rounds = max(least, min(most, int(budget_s / max(once, 1e-9))))
        samples: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(rounds):
            for name, function in functions.items():
                function()
                start = time.perf_counter()
                for _ in range(repeats[name]):
                    function()
                samples[name].append((time.perf_counter() - start) / repeats[name])
    return {name: _timing(values) for name, values in samples.items()}


def _timing(values: list[float]) -> Timing:
    ordered = sorted(values)
    count = len(ordered)
    return Timing(statistics.median(ordered), ordered[count // 4], ordered[(3 * count) // 4], count)


class _Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that come into being and are still referred to, by a tensor or a view."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._held: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Referred to by this list, the loop and the count itself, and by nobody else: let go.
        self._held = [t for t in self._held if sys.getrefcount(t) > 3]
        out = func(*args, **(kwargs or {}))
        ours = {_storage(t) for t in self._held}
        theirs = {_storage(t) for t in _tensors((args, kwargs))} - ours
        self._held += [t for t in _tensors(out) if _storage(t) not in theirs]
        self.peak = max(self.peak, sum({_storage(t): t.untyped_storage().nbytes() for t in self._held}.values()))
        return out


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most bytes that tensors made inside ``function`` held at one time."""
    with torch.inference_mode(), _Meter() as meter:
        function()
    return int(meter.peak)


def _storage(t: torch.Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
