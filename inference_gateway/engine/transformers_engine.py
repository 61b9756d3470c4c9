"""The embedded engine: transformers' continuous batching with permission rows and evidence per sequence.

Two halves meet in ``Residents`` and ``SequenceTable``. This one belongs to the askers and their event loop: it lets
requests in, hands their events out, and swaps adapters while the worker is held. ``Steps`` belongs to the worker.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Sequence, Set
from dataclasses import asdict
from typing import Any

from inference_gateway.engine.base import AdapterKey, EngineInfo, Event, GenerationRequest, StepGuard, Tokens
from inference_gateway.engine.batching_edge import BatchingEdge
from inference_gateway.engine.limits import EngineLimits
from inference_gateway.engine.passes import BROKEN, REPLACED, Passes
from inference_gateway.engine.residents import Residents
from inference_gateway.engine.sampling import Matcher, Sampler, sampler_of
from inference_gateway.engine.sequences import Running, SequenceTable
from inference_gateway.engine.steps import Steps
from seqr.adapter import Adapter
from seqr.library import Library, Statistics
from seqr.plan import Plan

__all__ = ["EngineLimits", "TransformersEngine"]


class TransformersEngine:
    """See ``Engine``. ``model`` must be adapted to ``plan`` (``seqr.routed_linear.adapt_model``) and idle.

    ``matcher_of`` starts a ``Sampling.grammar``; without it there are no grammars.
    """

    def __init__(
        self,
        model: Any,
        plan: Plan,
        guard: StepGuard,
        eos: Sequence[int],
        limits: EngineLimits | None = None,
        matcher_of: Callable[[str], Matcher] | None = None,
    ):
        limits = limits or EngineLimits()
        self._eos = frozenset(eos)
        self._matcher_of = matcher_of
        self._limits = limits
        context = int(model.config.get_text_config().max_position_embeddings)
        self._max_length = min(context, limits.kv_tokens, limits.max_model_length or context)
        # A cancelled request may sit in one more batch while its successor is already in it.
        slots = 2 * limits.max_concurrent
        self._residents = Residents(model, plan, slots, limits)
        self._sequences = SequenceTable(slots)
        self._changing = threading.Lock()
        self._admission = asyncio.Semaphore(limits.max_concurrent)
        self._waiting = 0
        self._edge = BatchingEdge(model, limits)
        self._passes = Passes(self._edge, self._sequences, limits.prefix_sharing)
        self.steps = Steps(self._residents, self._sequences, self._passes, guard, len(plan.modules))

    async def start(self) -> None:
        await asyncio.to_thread(self._edge.start, self.steps)

    async def stop(self) -> None:
        await asyncio.to_thread(self._edge.stop)
        for sequence in self._sequences:
            self._sequences.end(sequence.request_id, BROKEN)

    def info(self) -> EngineInfo:
        blocks, used = self._edge.kv_blocks()
        return EngineInfo(
            max_model_length=self._max_length,
            max_concurrent=self._limits.max_concurrent,
            running=len(self._sequences),
            waiting=self._waiting,
            adapters=tuple(sorted(self._residents.usable)),
            library_version=self._residents.library.version,
            alive=self._edge.alive,
            kv_blocks=blocks,
            kv_blocks_used=used,
            permission_rows=len(self._residents.rows),
            **asdict(self.steps.counters),
        )

    # Adapters

    async def load(self, key: AdapterKey, adapter: Adapter, statistics: Statistics | None) -> int:
        def change(library: Library) -> Library:
            put = library.replace if key.silo_id in library.silos else library.add
            return put(key.silo_id, key.revision, adapter, statistics)

        return await asyncio.to_thread(
            self._change, change, lambda k: {key} | {o for o in k if o.silo_id != key.silo_id}
        )

    async def revoke(self, key: AdapterKey) -> int:
        if key not in self._residents.keys:
            return self._residents.library.version
        return await asyncio.to_thread(self._change, lambda library: library.remove(key.silo_id), lambda k: k - {key})

    async def retire(self, key: AdapterKey) -> None:
        with self._residents.membership:
            self._residents.retiring |= {key}
        while any(key in sequence.request.adapters for sequence in self._sequences):
            await asyncio.sleep(0.05)
        await self.revoke(key)

    def _change(
        self, change: Callable[[Library], Library], keys_after: Callable[[frozenset[AdapterKey]], Set[AdapterKey]]
    ) -> int:
        residents = self._residents
        with self._changing:
            library = change(residents.library)
            tables = residents.tables_of(library)
            with self._edge.paused():
                with residents.membership:
                    gone = residents.replace(library, tables, keys_after(residents.keys))
                    for sequence in self._sequences:
                        if not sequence.within(residents.keys):
                            self._sequences.end(sequence.request_id, REPLACED)
                            self._edge.drop(sequence.pass_id)
                # New requests may come in from here on; the worker is still held.
                self._edge.forget_prefixes()
                if gone:
                    # What an adapter has left in the cache goes with it.
                    self._edge.wipe_cache([sequence.pass_id for sequence in self._sequences])
        return library.version

    # Requests

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        queue: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(event: Event) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, event)

        sampler = await self._sampler(request)
        self._waiting += 1
        try:
            await self._admission.acquire()
        finally:
            self._waiting -= 1
        try:
            ends = self._eos.union(request.sampling.stop_ids)
            sequence = Running(request, deliver, sampler, ends, reading=_must_read(request))
            with self._residents.membership:
                admitted = request.adapters <= self._residents.usable
                if admitted:
                    self._sequences.add(sequence)
            if not admitted:
                yield REPLACED
                return
            try:
                self._passes.submit(sequence, self._residents.library)
                while True:
                    event = await queue.get()
                    if isinstance(event, Tokens):
                        # What lies here for a slow reader must not leave once its silo or its permission is gone.
                        if not sequence.within(self._residents.keys):
                            yield REPLACED
                            return
                        if sequence.failed:
                            continue
                    yield event
                    if not isinstance(event, Tokens):
                        return
            finally:
                await self.abort(request.request_id)
        finally:
            self._admission.release()

    async def _sampler(self, request: GenerationRequest) -> Sampler | None:
        matcher, grammar = None, request.sampling.grammar
        if grammar is not None:
            if self._matcher_of is None:
                raise ValueError("this engine was made without grammars")
            matcher = await asyncio.to_thread(self._matcher_of, grammar)
        return sampler_of(request.sampling, request.prompt, matcher)

    async def abort(self, request_id: str) -> None:
        self._passes.end(request_id, None)


def _must_read(request: GenerationRequest) -> bool:
    """Whether the prompt has to be read first: not where there is nothing to choose between."""
    return request.mode == "prompt_evidence" and len(request.adapters) > 1
