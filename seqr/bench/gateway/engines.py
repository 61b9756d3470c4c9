"""The gateway's own engine with a library of any size, and one run of concurrent streams through it."""

import asyncio
import ctypes
import gc
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from inference_gateway.engine.base import AdapterKey, Failed, Finished, GenerationRequest
from inference_gateway.engine.transformers_engine import EngineLimits, TransformersEngine
from seqr.bench.errors import BenchFailed
from seqr.bench.gateway.sample import Sample
from seqr.bench.gateway.shelf import random_columns, speech
from seqr.bench.machine import resident_bytes
from seqr.bench.routing.memory import measured_bytes
from seqr.library import Library
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
        keys = frozenset(_key(silo, revision) for silo, revision in library.columns)
        await asyncio.to_thread(self._change, lambda _old: library, lambda _old: keys)
        return keys


@dataclass(frozen=True)
class Load:
    """What every stream of a run asks for: its prompt, and so many tokens, no fewer."""

    prompts: tuple[tuple[int, ...], ...]
    tokens: int
    dtype: str
    kv_tokens: int


class MeasuredEngine:
    """A filled engine and what its streams ask for."""

    def __init__(self, engine: FilledEngine, load: Load, library: Library, drawn: int):
        self._engine = engine
        self._load = load
        self._library = library
        self._drawn = drawn

    async def run(self, permitted: int, mode: str, attribution: bool = False, streams: int | None = None) -> Sample:
        """The first ``streams`` prompts at once, or all; each stream may use the first ``permitted`` silos."""
        load = replace(self._load, prompts=self._load.prompts[:streams])
        keys = frozenset(_key(silo, revision) for silo, revision in self._library.columns[:permitted])
        return await run_streams(self._engine, load, keys, mode, attribution)

    async def memory(self) -> dict[str, Any]:
        """Bytes per adapter: of tensors, and by how much this process grew when they were drawn."""
        count = len(self._library.silos)
        return {
            "adapters": count,
            "tensor bytes per adapter": measured_bytes(self._library) / count,
            "resident bytes per adapter": self._drawn / count,
        }


async def start_engine(path: Path, plan: Plan, load: Load, adapters: int, threads: int) -> MeasuredEngine:
    """An engine over a model of its own, with so many adapters resident. Only its worker computes in parallel."""
    # In a thread that ends, and OpenMP's pool with it; this one has not computed and is left with one thread.
    with ThreadPoolExecutor(1) as once:
        build = partial(_build, path, plan, load, adapters, threads)
        engine, library, drawn = await asyncio.get_running_loop().run_in_executor(once, build)
    await engine.start()
    if adapters:
        await engine.fill(library)
    return MeasuredEngine(engine, load, library, drawn)


def _build(path: Path, plan: Plan, load: Load, adapters: int, threads: int) -> tuple[FilledEngine, Library, int]:
    torch.set_num_threads(threads)
    model, tokenizer = load_base_model(path, getattr(torch, load.dtype), "sdpa")
    z = speech(model, tokenizer, plan) if adapters else {}
    before = _resident_bytes_here()
    columns = random_columns(plan, adapters, z)
    drawn = _resident_bytes_here() - before
    adapt_model(model, plan, verify_a(plan))
    limits = EngineLimits(max_concurrent=len(load.prompts), kv_tokens=load.kv_tokens, threads=threads)
    return FilledEngine(model, plan, NoGuard(), [], limits), Library(plan, columns, version=1), drawn


def _key(silo: str, revision: int) -> AdapterKey:
    return AdapterKey(silo, revision, f"bench-{silo}")


def _resident_bytes_here() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # glibc: what was freed is given back, or a few adapters would fit into it
    return resident_bytes(os.getpid())


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
