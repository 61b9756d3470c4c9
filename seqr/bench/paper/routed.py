"""Routers by name for one pool, and what each of them answers and whose adapters it uses."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from seqr.bench.paper.scoring import answers
from seqr.bench.paper.tasks import Example
from seqr.routers.interface import Activation, Batch, Mixture, Router
from seqr.routers.mixture_model import MixtureModel
from seqr.routers.oracle import OracleRouter
from seqr.routers.pool import AdapterPool, LoraFactors


@dataclass(frozen=True)
class Outcome:
    """What a router made of the rows of one task, row by row.

    predicted: the answers; share: which part of the (prompt token, module) choices went to the task's own adapter, the
    first token left out.
    """

    predicted: list[int]
    share: list[float]


class Watching(Router):
    """Another router, with a count per sequence of the weight that each adapter got."""

    def __init__(self, router: Router):
        super().__init__(router.pool)
        self._router = router
        self.name, self.reads = router.name, router.reads

    def begin(self, batch: Batch) -> None:
        super().begin(batch)
        self._router.begin(batch)
        self.weight = torch.zeros(batch.lengths.shape[0], len(self.pool) + 1)
        self._speaks = batch.speaks.to(torch.float32)[:, None]

    def read(self, activation: Activation) -> None:
        self._router.read(activation)

    def mixture(self, activation: Activation) -> Mixture:
        mixture = self._router.mixture(activation)
        of_token = torch.zeros(len(self._speaks), len(self.pool) + 1)
        of_token.scatter_add_(1, mixture.columns + 1, mixture.weights.to(of_token.dtype))
        self.weight.index_add_(0, self.batch.sequence, of_token.mul_(self._speaks))
        return mixture

    def shares(self) -> torch.Tensor:
        """fp32 [S, N]: each adapter's part of the choices so far, nobody's part left out."""
        return self.weight[:, 1:] / self.weight.sum(1, keepdim=True).clamp_min(1.0)


def run(
    model: Any,
    router: Router,
    examples: Sequence[Example],
    own: int,
    pad_token: int,
    permitted: torch.Tensor | None = None,
) -> Outcome:
    """Answer ``examples`` under ``router``; ``own`` is the column of the adapter trained on their task."""
    watching = Watching(router)
    share = [0.0] * len(examples)
    mixed = MixtureModel(model, router.pool)

    @contextmanager
    def routing(batch: Batch, ids: torch.Tensor, rows: list[int]) -> Iterator[None]:
        with mixed.routed(watching, batch, ids):
            yield
        if own >= 0:
            for row, part in zip(rows, watching.shares()[:, own].tolist(), strict=True):
                share[row] = part

    try:
        predicted = answers(model, examples, len(router.pool), pad_token, routing, permitted)
    finally:
        mixed.close()
    return Outcome(predicted, share)


def with_columns(
    model: Any, pool: AdapterPool, examples: Sequence[Example], columns: Sequence[int], pad_token: int
) -> list[int]:
    """The answers when each row is given one adapter of ``pool`` for all its tokens, or -1 for none."""
    if not examples:
        return []
    of_row = torch.tensor(columns)
    current: list[int] = []
    router = OracleRouter(pool, lambda batch: of_row[current])
    mixed = MixtureModel(model, pool)

    def routing(batch: Batch, ids: torch.Tensor, rows: list[int]) -> AbstractContextManager[None]:
        current[:] = rows
        return mixed.routed(router, batch, ids)

    try:
        return answers(model, examples, len(pool), pad_token, routing)
    finally:
        mixed.close()


def averaged(pool: AdapterPool) -> AdapterPool:
    """The one adapter that MU amounts to where A is shared and everything is permitted: the mean of all B."""
    mean: Mapping[str, LoraFactors] = {
        module: LoraFactors(pool.a[index], pool.b_t[index].mean(0).T) for index, module in enumerate(pool.modules)
    }
    return AdapterPool({"mean": mean}, pool.modules)
