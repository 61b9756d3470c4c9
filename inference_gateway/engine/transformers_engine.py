"""The embedded engine: transformers' continuous batching with permission rows and evidence per sequence."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence, Set
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from inference_gateway.engine.attribution import Part, attribute, attributed_parts, prompt_margin, watched_tokens
from inference_gateway.engine.base import (
    AdapterKey,
    EngineInfo,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    StepGuard,
    Tokens,
)
from inference_gateway.engine.batching_edge import BatchingEdge
from inference_gateway.engine.limits import EngineLimits
from inference_gateway.engine.prefixes import chain_of
from inference_gateway.engine.sampling import Matcher, Sampler, sampler_of
from inference_gateway.engine.sequences import Sequence as Running
from inference_gateway.engine.sequences import SequenceTable
from inference_gateway.engine.stepper import Batch, Output, Slice
from inference_gateway.errors import EngineIncompatible, EngineStopped, GrammarTooComplex
from seqr.adapter import Adapter
from seqr.library import Library, PermissionRows, Statistics
from seqr.plan import Plan
from seqr.routing.evidence import EvidenceStale, EvidenceState, Standing
from seqr.step import BaseOnly, Segment, StepContext

if TYPE_CHECKING:  # needs Triton
    from inference_gateway.engine.kernel_routing import KernelRouting, KernelStep

__all__ = ["EngineLimits", "TransformersEngine"]

log = logging.getLogger(__name__)

REPLACED = Failed("adapter_replaced", "a silo's adapter changed while this answer was being written; ask again")
BROKEN = Failed("generation_failed", "the answer could not be finished because of an internal error; ask again")
# Sets that users narrow by hand could fill the table without end; it is rebuilt from the running requests then.
MAX_ROWS = 1024


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
        self._plan = plan
        self._guard = guard
        self._eos = frozenset(eos)
        self._matcher_of = matcher_of
        self._limits = limits
        context = int(model.config.get_text_config().max_position_embeddings)
        self._max_length = min(context, limits.kv_tokens, limits.max_model_length or context)
        self._library = Library.empty(plan, model.device)
        self._rows = PermissionRows(self._library)
        self._keys: frozenset[AdapterKey] = frozenset()
        self._retiring: frozenset[AdapterKey] = frozenset()
        # A cancelled request may sit in one more batch while its successor is already in it.
        slots = 2 * limits.max_concurrent
        self._evidence = EvidenceState(len(plan.modules), slots, (), self._library.width, model.device)
        self._sequences = SequenceTable(slots)
        self._membership = threading.Lock()
        self._changing = threading.Lock()
        self._admission = asyncio.Semaphore(limits.max_concurrent)
        self._waiting = 0
        self._kernels = _kernels(model, plan, self._library, limits)
        self._step: StepContext | KernelStep | None = None
        self._batch: Batch | None = None
        self._parts: list[Part] = []
        self._began = self._step_seconds = 0.0
        self._prefix_queries = self._prefix_hits = self._preemptions = 0
        self._steps = self._prompt_tokens = self._generated_tokens = 0
        self._edge = BatchingEdge(
            model,
            self,
            max_requests=limits.max_concurrent,
            max_batch_tokens=max(limits.max_batch_tokens, limits.max_concurrent),
            kv_tokens=limits.kv_tokens,
            page_size=limits.page_size,
            prefix_sharing=limits.prefix_sharing,
            deterministic=limits.deterministic,
            threads=limits.threads,
        )

    async def start(self) -> None:
        await asyncio.to_thread(self._edge.start)

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
            adapters=tuple(sorted(self._keys - self._retiring)),
            library_version=self._library.version,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            alive=self._edge.alive,
            kv_blocks=blocks,
            kv_blocks_used=used,
            permission_rows=len(self._rows),
            prefix_queries=self._prefix_queries,
            prefix_hits=self._prefix_hits,
            preemptions=self._preemptions,
            step_seconds=self._step_seconds,
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
        if key not in self._keys:
            return self._library.version
        return await asyncio.to_thread(self._change, lambda library: library.remove(key.silo_id), lambda k: k - {key})

    async def retire(self, key: AdapterKey) -> None:
        with self._membership:
            self._retiring |= {key}
        while any(key in sequence.request.adapters for sequence in self._sequences):
            await asyncio.sleep(0.05)
        await self.revoke(key)

    def _change(
        self, change: Callable[[Library], Library], keys_after: Callable[[frozenset[AdapterKey]], Set[AdapterKey]]
    ) -> int:
        with self._changing:
            library = change(self._library)
            tables = self._kernels.tables_of(library) if self._kernels is not None else ()
            with self._edge.paused():
                with self._membership:
                    before, self._keys = self._keys, frozenset(keys_after(self._keys))
                    self._retiring &= self._keys
                    self._library = library
                    if self._kernels is not None:
                        self._kernels.tables = tables
                    self._rows = PermissionRows(library)
                    self._evidence.remap(library.columns, library.width)
                    for sequence in self._sequences:
                        if not sequence.within(self._keys):
                            self._sequences.end(sequence.request_id, REPLACED)
                            self._edge.drop(sequence.pass_id)
                    gone = before - self._keys
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
            with self._membership:
                admitted = request.adapters <= self._keys - self._retiring
                sequence = Running(request, deliver, sampler, reading=_must_read(request))
                if admitted:
                    self._sequences.add(sequence)
            if not admitted:
                yield REPLACED
                return
            try:
                self._submit(sequence)
                if sequence.ended:  # by the policy or a swap, before there was a pass to cancel
                    self._edge.cancel(sequence.pass_id)
                while True:
                    event = await queue.get()
                    if isinstance(event, Tokens):
                        # What lies here for a slow reader must not leave once its silo or its permission is gone.
                        if not sequence.within(self._keys):
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

    def _submit(self, sequence: Running) -> None:
        # The library gives at least one token; of a prompt that is only read it is thrown away.
        tokens = 1 if sequence.reading else sequence.request.max_tokens
        if self._limits.prefix_sharing:
            library = self._library
            sequence.chain, sequence.library_version = chain_of(sequence, library), library.version
        self._edge.submit(sequence.pass_id, sequence.request.prompt, tokens, sorted(self._ends_of(sequence)))

    def _ends_of(self, sequence: Running) -> frozenset[int]:
        return self._eos.union(sequence.request.sampling.stop_ids)

    async def abort(self, request_id: str) -> None:
        self._end(request_id, None)

    def _end(self, request_id: str, why: Failed | None) -> None:
        sequence = self._sequences.end(request_id, why)
        if sequence is not None:
            self._edge.cancel(sequence.pass_id)

    # The worker's thread. Ids here are those of passes, except in ``_enforce``.

    def _end_pass(self, pass_id: str, why: Failed) -> None:
        sequence = self._sequences.get(pass_id)
        if sequence is not None:
            self._end(sequence.request_id, why)

    def begin(self, batch: Batch) -> StepContext | BaseOnly | None:
        """The permissions and evidence of a step. Whatever is in doubt gets row 0 and its request ends."""
        self._batch, self._step, self._began = batch, None, time.perf_counter()
        try:
            for slot in self._sequences.reclaim():
                self._evidence.free(slot)
            self._enforce()
            if self._rows.table.shape[0] > MAX_ROWS:
                self._rows = PermissionRows(self._library)
            segments = [self._segment(one) for one in batch.slices]
            self._parts = attributed_parts(batch, self._sequences.get)
            watched = watched_tokens(self._parts)
            if self._kernels is not None and self._kernels.takes(segments, self._parts):
                self._step = self._kernels.step(self._rows, segments, self._evidence, batch.tokens, watched)
                return None
            self._step = StepContext(self._rows, segments, self._evidence, batch.tokens, watched=watched)
        except Exception:
            log.exception("no step context could be made; the step runs without adapters and its requests end")
            for one in batch.slices:
                self._end_pass(one.request_id, BROKEN)
            return BaseOnly()
        return self._step

    def _segment(self, one: Slice) -> Segment:
        nobody = Segment(0, one.position, one.length, -1, "per_token")
        sequence = self._sequences.get(one.request_id)
        if sequence is None or sequence.ended:
            return nobody
        if not sequence.within(self._keys):
            self._end_pass(one.request_id, REPLACED)
            return nobody
        self._follow(sequence, one)
        row = 0 if sequence.reading else self._rows.row_for(sequence.silos)
        mode, standing = sequence.request.mode, sequence.standing
        if mode == "per_token":
            return Segment(row, one.position, one.length, mode=mode)
        if mode == "prompt_evidence" and not sequence.reading:
            return Segment(row, one.position, one.length, mode=mode, standing=standing or Standing({}))
        slot = self._sequences.slot_of(sequence)
        try:
            if slot is None:
                raise EvidenceStale("all evidence slots are in use")
            self._evidence.check(slot, one.position)
        except EvidenceStale:
            log.exception("request %s ends: its evidence does not continue", one.request_id)
            self._end_pass(one.request_id, BROKEN)
            return nobody
        recent = _words_end(sequence.request) if sequence.reading else None
        return Segment(row, one.position, one.length, slot, "evidence", sequence.request.frame, recent=recent)

    def _follow(self, sequence: Running, one: Slice) -> None:
        """Count where a pass begins: after what it found in the cache, or again after it was preempted."""
        if one.position < sequence.next_position:
            self._preemptions += 1
        elif sequence.next_position == 0 and sequence.chain:
            self._prefix_queries += len(sequence.request.prompt)
            self._prefix_hits += one.position
        sequence.next_position = one.position + one.length

    def prefix_chain(self, request_id: str) -> list[bytes] | None:
        sequence = self._sequences.get(request_id)
        if sequence is None or not sequence.chain or sequence.library_version != self._library.version:
            return None
        return sequence.chain

    def pick(self, request_ids: Sequence[str], logits: torch.Tensor) -> None:
        best = logits.max(dim=1).values.tolist()
        for row, request_id in enumerate(request_ids):
            sequence = self._sequences.get(request_id)
            if sequence is None:
                continue
            if not abs(best[row]) < float("inf"):
                log.error("request %s ends: its logits are not finite", request_id)
                self._end_pass(request_id, BROKEN)
            elif sequence.sampler is not None and not sequence.reading:
                try:
                    token = sequence.sampler.next(logits[row])
                except GrammarTooComplex as error:
                    self._end_pass(request_id, Failed(error.code, str(error)))
                    continue
                except Exception:
                    log.exception("request %s ends: no token could be drawn for it", request_id)
                    self._end_pass(request_id, BROKEN)
                    continue
                logits[row].fill_(-float("inf"))
                logits[row, token] = 0.0

    def completed(self) -> None:
        step, parts = self._step, self._parts
        self._leave()
        if step is None:
            return
        step.finish()
        self._steps += 1
        self._step_seconds += time.perf_counter() - self._began
        attribute(parts, step, len(self._plan.modules))

    def failed(self, error: Exception) -> None:
        batch = self._batch
        self._leave()
        for one in batch.slices if batch is not None else ():
            self._end_pass(one.request_id, BROKEN)

    def _leave(self) -> None:
        self._step, self._batch, self._parts = None, None, []
        if self._kernels is not None:
            self._kernels.leave()

    def deliver(self, outputs: Sequence[Output]) -> None:
        # The policy may have changed during the step: what it computed must not leave then.
        self._enforce()
        for output in outputs:
            sequence = self._sequences.get(output.request_id)
            if sequence is None:
                continue
            if sequence.reading:
                self._go_on(sequence, output)
                continue
            fresh = output.generated[sequence.generated :]
            if sequence.generated == 0 and fresh:
                self._prompt_tokens += len(sequence.request.prompt)
            self._generated_tokens += len(fresh)
            self._sequences.hand_out(sequence.request_id, fresh)
            if output.error is not None:
                self._sequences.end(sequence.request_id, BROKEN)
            elif output.finished:
                reason = "stop" if sequence.last_token in self._ends_of(sequence) else "length"
                self._sequences.end(sequence.request_id, Finished(reason, sequence.shares))

    def _go_on(self, sequence: Running, output: Output) -> None:
        """From reading the prompt to answering it."""
        # Whoever ends the request takes the slot from it at any moment; what is in it stays until the next step.
        slot = sequence.slot
        if output.error is not None or slot is None:
            self._sequences.end(sequence.request_id, BROKEN)
        elif output.finished:
            adapters = {(key.silo_id, key.revision) for key in sequence.request.adapters}
            standing = self._evidence.standing(slot, adapters)
            sequence.margin = prompt_margin(sequence, self._rows, standing, len(self._plan.modules))
            self._sequences.has_read(sequence, standing)
            try:
                self._submit(sequence)
            except EngineStopped:
                self._sequences.end(sequence.request_id, BROKEN)
            if sequence.ended:  # by its asker, meanwhile
                self._edge.cancel(sequence.pass_id)

    def _enforce(self) -> None:
        try:
            withdrawn: Mapping[str, Failed] = self._guard.withdrawn()
        except Exception:
            log.exception("the policy cannot be read; every request that uses a silo ends")
            withdrawn = {s.request_id: BROKEN for s in self._sequences if s.request.adapters}
        for request_id, why in withdrawn.items():
            self._end(request_id, why)


def _kernels(model: Any, plan: Plan, library: Library, limits: EngineLimits) -> "KernelRouting | None":
    if limits.kernels is None:
        wanted = model.device.type == "cuda" and not limits.deterministic and find_spec("triton") is not None
    else:
        wanted = limits.kernels
    if not wanted:
        return None
    if limits.deterministic:
        raise EngineIncompatible("deterministic serving cannot route with kernels")
    from inference_gateway.engine.kernel_routing import KernelRouting

    return KernelRouting(model, plan, library)


def _must_read(request: GenerationRequest) -> bool:
    """Whether the prompt has to be read first: not where there is nothing to choose between."""
    return request.mode == "prompt_evidence" and len(request.adapters) > 1


def _words_end(request: GenerationRequest) -> int:
    """The position after the prompt's last word: where the frame's end begins, or the prompt's own end."""
    return request.frame.tail.start if request.frame.tail else len(request.prompt)
