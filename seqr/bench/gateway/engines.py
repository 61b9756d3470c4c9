"""The gateway's own engine with a library of any size, and one run of concurrent streams through it."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from inference_gateway.engine.base import AdapterKey, Failed, Finished, GenerationRequest
from inference_gateway.engine.transformers_engine import EngineLimits, TransformersEngine
from seqr.bench.errors import BenchFailed
from seqr.bench.gateway.sample import Sample
from seqr.library import Column, Library
from seqr.models import load_base_model
from seqr.plan import Plan
from seqr.routed_linear import adapt_model
from seqr.shared_a import verify_a


class NoGuard:
    """Nothing is ever withdrawn."""

    def withdrawn(self) -> Mapping[str, Failed]:
        """No request."""
        return {}


class FilledEngine(TransformersEngine):
    """An engine that takes a whole library at once; one by one, a thousand adapters would take an hour."""

    async def fill(self, library: Library) -> frozenset[AdapterKey]:
        """Make ``library`` the engine's; returns its adapters' keys."""
        keys = frozenset(AdapterKey(silo, revision, f"bench-{silo}") for silo, revision in library.columns)
        await asyncio.to_thread(self._change, lambda _old: library, lambda _old: keys)
        return keys


@dataclass(frozen=True)
class Load:
    """What every stream of a run asks for: its prompt, and so many tokens, no fewer."""

    prompts: tuple[tuple[int, ...], ...]
    tokens: int
    dtype: str
    kv_tokens: int


async def start_engine(path: Path, plan: Plan, columns: Sequence[Column], load: Load) -> FilledEngine:
    """An engine over a model of its own, with ``columns`` resident."""
    model, _ = load_base_model(path, getattr(torch, load.dtype), "sdpa")
    adapt_model(model, plan, verify_a(plan))
    limits = EngineLimits(max_concurrent=len(load.prompts), kv_tokens=load.kv_tokens)
    engine = FilledEngine(model, plan, NoGuard(), [], limits)
    await engine.start()
    if columns:
        await engine.fill(Library(plan, columns, version=1))
    return engine


async def run_streams(
    engine: TransformersEngine, load: Load, keys: frozenset[AdapterKey], mode: str, attribution: bool = False
) -> Sample:
    """All prompts of ``load`` at once. Raises ``BenchFailed``."""

    async def one(index: int) -> tuple[int, float, float]:
        request_id = f"{time.monotonic_ns()}-{index}"
        request = GenerationRequest(request_id, load.prompts[index], load.tokens, keys, mode, attribution=attribution)
        tokens, first, asked = 0, 0.0, time.perf_counter()
        async for event in engine.generate(request):
            if isinstance(event, Failed):
                raise BenchFailed(f"a stream of the benchmark failed: {event.code}: {event.message}")
            if not isinstance(event, Finished):
                first = first or time.perf_counter() - asked
                tokens += len(event.ids)
        return tokens, first, time.perf_counter() - asked

    wall, cpu = time.perf_counter(), time.process_time()
    ends = await asyncio.gather(*(one(index) for index in range(len(load.prompts))))
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    tokens, first, whole = zip(*ends, strict=True)
    return Sample(seconds, cpu_seconds, sum(tokens), first, whole)
