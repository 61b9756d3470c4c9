"""Can a caller tell by the clock that silos exist which are not theirs? Two distributions of times, and a KS test."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from seqr.bench.errors import BenchFailed
from seqr.bench.gateway.child import Child
from seqr.bench.gateway.options import Options
from seqr.bench.gateway.serving import Served, served_gateway
from seqr.bench.gateway.shelf import silo_name

# Two equal distributions give a p below this once in a thousand runs.
LEAST_P = 0.001


def compare(name: str, one: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """The two-sided Kolmogorov-Smirnov test of two samples of seconds. Source: scipy.stats.ks_2samp."""
    from scipy.stats import ks_2samp

    result = ks_2samp(one, other)
    median = sorted(one)[len(one) // 2], sorted(other)[len(other) // 2]
    return {
        "what": name,
        "samples": len(one),
        "medians": list(median),
        "D": float(result.statistic),
        "p": float(result.pvalue),
        "indistinguishable": bool(result.pvalue >= LEAST_P),
    }


def refusals(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """How long a refusal takes over HTTP: of a silo that is resident and forbidden, and of one that nobody knows."""
    times, found = 10 * options.answers, {"forbidden": list[float](), "unknown": list[float]()}
    with tempfile.TemporaryDirectory() as folder:
        say("refusals: the gateway comes up")
        with served_gateway(options, Path(folder) / "gateway", 3, 1) as served:
            say(f"refusals: {times} of each")
            # The last silo is granted to nobody; the other name has its length.
            forbidden, unknown = (_refused(served, name) for name in (silo_name(2), silo_name(99_999)))
            for _ in range(times):
                found["forbidden"].append(next(forbidden))
                found["unknown"].append(next(unknown))
    return compare("HTTP refusal: forbidden and resident, unknown", found["forbidden"], found["unknown"])


def _refused(served: Served, silo: str) -> Iterator[float]:
    """The seconds of one refusal after the other. Raises ``BenchFailed``."""
    body = {"model": f"silo:{silo}", "messages": [{"role": "user", "content": "x"}]}
    headers = {"Authorization": f"Bearer {served.keys['user0']}"}
    with httpx.Client(base_url=served.url, headers=headers) as http:
        http.get("/v1/models")  # the connection is there
        while True:
            start = time.perf_counter()
            status = http.post("/v1/chat/completions", json=body).status_code
            seconds = time.perf_counter() - start
            if status != 404:
                raise BenchFailed(f"the silo {silo} was not refused with 404 but answered with {status}")
            yield seconds


async def crowded(small: Child, large: Child, sizes: tuple[int, int], times: int) -> dict[str, Any]:
    """How long an answer takes the user of all of the small engine's silos there, and in the large one."""
    found: tuple[list[float], list[float]] = ([], [])
    for turn in range(times + 1):
        for engine, seconds in zip((small, large), found, strict=True):
            sample = await engine.ask("run", sizes[0], "prompt_evidence", False, 1)
            if turn:
                seconds.append(sample.seconds)
    return compare(f"answer of a user of {sizes[0]} silos, {sizes[0]} or {sizes[1]} resident", *found)
