"""``--load``: a crowd of streams against a served gateway, its answers counted and its memory watched."""

import asyncio
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from seqr.bench.gateway.options import Options
from seqr.bench.gateway.sample import quantile
from seqr.bench.gateway.serving import Served, served_gateway
from seqr.bench.machine import resident_bytes

ADAPTERS, USERS = 8, 8
# Answers that say "not now" and mean it.
ALLOWED = frozenset({"200", "429", "503"})
# The last quarter's memory may be this much above the second quarter's: allocators keep some of what they once needed.
FLAT = 1.05
_WORDS = [
    "the",
    "red",
    "boat",
    "lies",
    "in",
    "the",
    "old",
    "harbour",
    "and",
    "waits",
    "for",
    "wind",
    "from",
    "the",
    "west",
]


@dataclass
class Tally:
    """What came of all requests. ``ends``: by HTTP status, or ``stream: <code>`` for an error after the beginning."""

    ends: Counter[str] = field(default_factory=Counter)
    pieces: int = 0
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    @property
    def errors(self) -> int:
        """How many ended otherwise than with 200, 429 or 503."""
        return sum(count for end, count in self.ends.items() if end not in ALLOWED)


def run_crowd(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """``load_streams`` clients that ask again as soon as they have been answered, for ``load_seconds``."""
    with tempfile.TemporaryDirectory() as folder:
        say("crowd: the gateway comes up")
        with served_gateway(options, Path(folder) / "gateway", ADAPTERS, USERS) as served:
            say(f"crowd: {options.load_streams} streams for {options.load_seconds:.0f} s")
            tally = asyncio.run(crowd(served, options.load_streams, options.load_seconds, options.tokens))
    return as_figures(tally, options)


def as_figures(tally: Tally, options: Options) -> dict[str, Any]:
    """The section of the report."""
    first, whole = sorted(tally.first), sorted(tally.whole)
    row: dict[str, Any] = {
        "streams": options.load_streams,
        "seconds": options.load_seconds,
        "adapters": ADAPTERS,
        "tokens each": options.tokens,
        "ends": dict(sorted(tally.ends.items())),
        "errors": tally.errors,
        "pieces per second": tally.pieces / options.load_seconds,
    }
    if first and whole:
        row |= {"first piece p50": quantile(first, 0.5), "first piece p99": quantile(first, 0.99)}
        row |= {"answer p50": quantile(whole, 0.5), "answer p99": quantile(whole, 0.99)}
    return row | flatness(tally.memory)


def flatness(memory: Sequence[int]) -> dict[str, Any]:
    """Resident bytes over time, by quarters; the first one is warming up. ``flat``: the last is no more than 5% above
    the second.
    """
    size = len(memory) // 4
    starts = range(0, size * 4, size) if size else ()
    quarters = [int(statistics.median(memory[start : start + size])) for start in starts]
    return {"resident bytes by quarter": quarters, "flat": bool(quarters) and quarters[3] <= FLAT * quarters[1]}


async def crowd(served: Served, streams: int, seconds: float, tokens: int) -> Tally:
    """What came of ``streams`` clients that ask until ``seconds`` are over."""
    tally = Tally()
    limits = httpx.Limits(max_connections=streams, max_keepalive_connections=streams)
    async with httpx.AsyncClient(base_url=served.url, timeout=None, limits=limits) as http:
        watching = asyncio.create_task(_watch(served.pid, tally))
        deadline = time.monotonic() + seconds
        keys = list(served.keys.values())
        await asyncio.gather(
            *(_client(http, served, keys[i % len(keys)], i, tokens, deadline, tally) for i in range(streams))
        )
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    return tally


async def _client(
    http: httpx.AsyncClient, served: Served, key: str, number: int, tokens: int, deadline: float, tally: Tally
) -> None:
    turn = 0
    while time.monotonic() < deadline:
        turn += 1
        words = [_WORDS[(number + place * (1 + turn % 5)) % len(_WORDS)] for place in range(24)]
        body = {
            "model": served.model,
            "messages": [{"role": "user", "content": " ".join(words)}],
            "max_tokens": tokens,
            "stream": True,
        }
        asked = time.monotonic()
        try:
            end, wait = await _ask(http, key, body, asked, tally)
        except httpx.HTTPError as error:
            end, wait = f"connection: {type(error).__name__}", 0.2
        tally.ends[end] += 1
        if wait:
            await asyncio.sleep(min(wait, max(0.0, deadline - time.monotonic())))


async def _ask(
    http: httpx.AsyncClient, key: str, body: dict[str, Any], asked: float, tally: Tally
) -> tuple[str, float]:
    """(how it ended, how long to wait before the next request) of one streamed answer."""
    headers = {"Authorization": f"Bearer {key}"}
    async with http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
        if response.status_code != 200:
            await response.aread()
            return str(response.status_code), float(response.headers.get("retry-after", "0.2"))
        begun, end = False, "stream: broken off"
        async for line in response.aiter_lines():
            event = json.loads(line.removeprefix("data: ")) if line.startswith("data: {") else {}
            if "error" in event:
                return f"stream: {event['error']['code']}", 0.0
            if any(choice["delta"].get("content") for choice in event.get("choices", ())):
                tally.pieces += 1
                if not begun:
                    tally.first.append(time.monotonic() - asked)
                begun = True
            end = "200" if line == "data: [DONE]" else end
        tally.whole.append(time.monotonic() - asked)
        return end, 0.0


async def _watch(pid: int, tally: Tally) -> None:
    while True:
        tally.memory.append(resident_bytes(pid))
        await asyncio.sleep(0.5)
