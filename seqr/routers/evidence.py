"""Accumulated evidence: scores are summed over what a sequence has said, not taken token by token (decision 7)."""

import torch

from seqr.routers.interface import Activation, Batch, Mixture, Router
from seqr.routers.pool import AdapterPool
from seqr.routers.seqr import SeqrRouter
from seqr.routers.statistics import Statistics
from seqr.routing.evidence import GRID, EvidencePass, EvidenceState, Spans, recency
from seqr.routing.scores import CLIP, choose


class EvidenceRouter(Router):
    """In one pass: at module l and position t the sum of clipped scores over positions 1..t and modules up to l."""

    name = "evidence"

    def __init__(self, pool: AdapterPool, statistics: Statistics):
        super().__init__(pool)
        self._seqr = SeqrRouter(pool, statistics)

    def begin(self, batch: Batch) -> None:
        super().begin(batch)
        count, width = batch.lengths.shape[0], batch.width
        first = torch.arange(count) * width
        begun = batch.real & (batch.position > 0)
        spans = Spans(torch.arange(count), first, first + width - 1, batch.sequence, begun.to(torch.float32))
        state = EvidenceState(len(self.pool.modules), count, (), len(self.pool), batch.lengths.device)
        self._pass = EvidencePass(state, spans)
        self._allowed = batch.allowed & begun[:, None]

    def mixture(self, activation: Activation) -> Mixture:
        return Mixture.of_one(self._pass.route(activation.module, self._seqr.scores(activation), self._allowed))


class PromptEvidenceRouter(Router):
    """The base model reads the prompt first; the sum over its words and modules decides for the sequence.

    A word counts half as much as the word 6 places after it (``seqr.routing.evidence.recency``).
    clip: bound of one token's score in one module. threshold: the mean score per token and module that the best
    adapter must exceed, or nobody is chosen and the base model speaks; None to choose always. modules: the sites that
    count, by index; None for all.
    """

    name = "prompt_evidence"
    reads = True

    def __init__(
        self,
        pool: AdapterPool,
        statistics: Statistics,
        clip: float = CLIP,
        threshold: float | None = None,
        modules: frozenset[int] | None = None,
    ):
        super().__init__(pool)
        self._seqr = SeqrRouter(pool, statistics)
        self._clip = clip
        self._threshold = threshold
        self._modules = modules

    def begin(self, batch: Batch) -> None:
        super().begin(batch)
        self._weight = recency(batch.prompts[batch.sequence] - 1 - batch.position) * batch.speaks
        self._sums = torch.zeros(batch.lengths.shape[0], len(self.pool), dtype=torch.float64)
        self._sites = 0
        self._column: torch.Tensor | None = None

    def read(self, activation: Activation) -> None:
        if len(self.pool) == 0 or (self._modules is not None and activation.module not in self._modules):
            return
        score = self._seqr.scores(activation)
        units = score.nan_to_num(-self._clip, -self._clip, -self._clip).clamp(-self._clip, self._clip)
        units = (units * (self._weight * GRID)[:, None]).round().to(torch.float64)
        self._sums.index_add_(0, self.batch.sequence, units)
        self._sites += 1

    def evidence(self) -> torch.Tensor:
        """fp64 [S, N]: each sequence's weighted mean of clipped scores over its words and the modules read so far."""
        count, weight = self.batch.lengths.shape[0], self._weight.to(torch.float64)
        words = weight.new_zeros(count).index_add_(0, self.batch.sequence, weight)
        # A prompt of one token has no word, and its sums are 0.
        return self._sums / GRID / words.clamp_min(1.0)[:, None] / max(1, self._sites)

    def mixture(self, activation: Activation) -> Mixture:
        if self._column is None:
            value, allowed = self.evidence(), self.batch.permitted
            if self._threshold is not None:
                allowed = allowed & (value > self._threshold)
            self._column = choose(value, allowed)
        return Mixture.of_one(self._column[self.batch.sequence].masked_fill(~self.batch.real, -1))
