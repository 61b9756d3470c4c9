"""The worker's half of the engine: which permissions and evidence a step runs with, and where its tokens go."""

import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from inference_gateway.engine.attribution import Part, attribute, attributed_parts, prompt_margin, watched_tokens
from inference_gateway.engine.base import Counters, Failed, Finished, StepGuard
from inference_gateway.engine.passes import BROKEN, REPLACED, Passes
from inference_gateway.engine.prefixes import reach_of
from inference_gateway.engine.residents import Residents
from inference_gateway.engine.sequences import Running, SequenceTable
from inference_gateway.engine.stepper import Batch, Output, Slice
from inference_gateway.errors import EngineStopped, GrammarTooComplex
from seqr.routing.evidence import EvidenceStale, Standing
from seqr.step import BaseOnly, Segment, StepContext

if TYPE_CHECKING:  # needs Triton
    from inference_gateway.engine.kernel_routing import KernelStep

log = logging.getLogger(__name__)


class Steps:
    """See ``Stepper``; all of it is called on the worker's thread. Ids are those of passes, except in ``_enforce``.

    ``modules``: how many are adapted.
    """

    def __init__(self, residents: Residents, sequences: SequenceTable, passes: Passes, guard: StepGuard, modules: int):
        self.counters = Counters()
        self._residents = residents
        self._sequences = sequences
        self._passes = passes
        self._guard = guard
        self._modules = modules
        self._step: StepContext | KernelStep | None = None
        self._batch: Batch | None = None
        self._parts: list[Part] = []
        self._began = 0.0

    def begin(self, batch: Batch) -> StepContext | BaseOnly | None:
        """The permissions and evidence of a step. Whatever is in doubt gets row 0 and its request ends."""
        self._batch, self._step, self._began = batch, None, time.perf_counter()
        residents = self._residents
        try:
            for slot in self._sequences.reclaim():
                residents.evidence.free(slot)
            self._enforce()
            residents.limit_rows()
            segments = [self._segment(one) for one in batch.slices]
            self._parts = attributed_parts(batch, self._sequences.get)
            watched = watched_tokens(self._parts)
            rows, evidence, kernels = residents.rows, residents.evidence, residents.kernels
            if kernels is not None and kernels.takes(segments, self._parts):
                self._step = kernels.step(rows, segments, evidence, batch.tokens, watched)
                return None
            self._step = StepContext(rows, segments, evidence, batch.tokens, watched=watched)
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
            # Its cancellation may have come before the pass itself, and is then forgotten.
            self._passes.cancel(one.request_id)
            return nobody
        if not sequence.within(self._residents.keys):
            self._end_pass(one.request_id, REPLACED)
            return nobody
        self._follow(sequence, one)
        row = 0 if sequence.reading else self._residents.rows.row_for(sequence.silos)
        mode, standing = sequence.request.mode, sequence.standing
        if mode == "per_token":
            return Segment(row, one.position, one.length, mode=mode)
        if mode == "prompt_evidence" and not sequence.reading:
            return Segment(row, one.position, one.length, mode=mode, standing=standing or Standing({}))
        slot = self._sequences.slot_of(sequence)
        if sequence.ended:
            return nobody
        try:
            if slot is None:
                raise EvidenceStale("all evidence slots are in use")
            if sequence.reading and 0 < one.position <= sequence.silent:
                # Nothing has been said before here, whether it was computed or found in the cache.
                self._residents.evidence.begin_at(slot, one.position)
            self._residents.evidence.check(slot, one.position)
        except EvidenceStale:
            log.exception("request %s ends: its evidence does not continue", one.request_id)
            self._end_pass(one.request_id, BROKEN)
            return nobody
        recent = sequence.words_end if sequence.reading else None
        return Segment(row, one.position, one.length, slot, "evidence", sequence.request.frame, recent=recent)

    def _follow(self, sequence: Running, one: Slice) -> None:
        """Count where a pass begins: after what it found in the cache, or again after it was preempted."""
        if one.position < sequence.next_position:
            self.counters.preemptions += 1
        elif sequence.next_position == 0 and sequence.chain:
            self.counters.prefix_queries += len(sequence.request.prompt)
            self.counters.prefix_hits += one.position
        sequence.next_position = one.position + one.length

    def prefix_chain(self, request_id: str) -> tuple[list[bytes], int] | None:
        sequence = self._sequences.get(request_id)
        if sequence is None or not sequence.chain or sequence.library_version != self._residents.library.version:
            return None
        return sequence.chain, reach_of(sequence)

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
        self.counters.steps += 1
        self.counters.step_seconds += time.perf_counter() - self._began
        attribute(parts, step, self._modules)

    def failed(self, error: Exception) -> None:
        batch = self._batch
        self._leave()
        for one in batch.slices if batch is not None else ():
            self._end_pass(one.request_id, BROKEN)

    def _leave(self) -> None:
        self._step, self._batch, self._parts = None, None, []
        if self._residents.kernels is not None:
            self._residents.kernels.leave()

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
                self.counters.prompt_tokens += len(sequence.request.prompt)
            self.counters.generated_tokens += len(fresh)
            self._sequences.hand_out(sequence.request_id, fresh)
            if output.error is not None:
                self._sequences.end(sequence.request_id, BROKEN)
            elif output.finished:
                reason = "stop" if sequence.last_token in sequence.ends else "length"
                self._sequences.end(sequence.request_id, Finished(reason, sequence.shares))

    def _go_on(self, sequence: Running, output: Output) -> None:
        """From reading the prompt to answering it."""
        # Whoever ends the request takes the slot from it at any moment; what is in it stays until the next step.
        slot = sequence.slot
        if output.error is not None or slot is None:
            self._sequences.end(sequence.request_id, BROKEN)
        elif output.finished:
            residents = self._residents
            adapters = {(key.silo_id, key.revision) for key in sequence.request.adapters}
            standing = residents.evidence.standing(slot, adapters)
            sequence.margin = prompt_margin(sequence, residents.rows, standing, self._modules)
            self._sequences.has_read(sequence, standing)
            try:
                self._passes.submit(sequence, residents.library)
            except EngineStopped:
                self._passes.end(sequence.request_id, BROKEN)

    def _enforce(self) -> None:
        try:
            withdrawn: Mapping[str, Failed] = self._guard.withdrawn()
        except Exception:
            log.exception("the policy cannot be read; every request that uses a silo ends")
            withdrawn = {s.request_id: BROKEN for s in self._sequences if s.request.adapters}
        for request_id, why in withdrawn.items():
            self._passes.end(request_id, why)

    def _end_pass(self, pass_id: str, why: Failed) -> None:
        sequence = self._sequences.get(pass_id)
        if sequence is not None:
            self._passes.end(sequence.request_id, why)
