"""Activation norms of every adapter on the base model's hidden states: what all evidence is made of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from seqr.bench.paper.scoring import like_length
from seqr.routers.interface import Activation, Batch, Mixture
from seqr.routers.mixture_model import MixtureModel, hidden_states
from seqr.routers.norms import SquaredNorms
from seqr.routers.oracle import OracleRouter
from seqr.routers.pool import AdapterPool
from seqr.routers.statistics import Statistics

Look = Callable[[Activation], torch.Tensor]


@dataclass(frozen=True)
class Norms:
    """||B_i A_i x|| fp32 [T, M, N] for T tokens, M modules, N adapters; row int64 [T]: the sequence of each token.

    The first token of a sequence, an attention sink, is left out. Tokens are in order of their sequences.
    size fp32 [T, M]: ||A x||, for a shared A.
    """

    norms: torch.Tensor
    row: torch.Tensor
    size: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """For a store."""
        return {"norms": self.norms, "row": self.row, "size": self.size}

    def statistics(self) -> Statistics:
        """Mean and standard deviation of each adapter's norms per module, over all these tokens."""
        wide = self.norms.to(torch.float64)
        return Statistics(wide.mean(0), wide.std(0, correction=0))


def read(
    model: Any, pool: AdapterPool, sequences: Sequence[Sequence[int]], pad_token: int, owner: int | None = None
) -> Norms:
    """The norms on ``sequences``, with no adapter active, or with adapter ``owner`` active as in its own training."""
    squared = SquaredNorms(pool, torch.ones(len(pool.modules), len(pool), dtype=torch.float64))

    def look(activation: Activation) -> torch.Tensor:
        size = activation.z.square().sum(-1)
        return torch.cat([squared(activation), size[:, None] if pool.shared else size[:, :1]], 1).sqrt()

    seen, row = look_at(model, pool, sequences, pad_token, look, owner)
    return Norms(seen[:, :, :-1].contiguous(), row, seen[:, :, -1].contiguous())


def look_at(
    model: Any,
    pool: AdapterPool,
    sequences: Sequence[Sequence[int]],
    pad_token: int,
    look: Look,
    owner: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``look`` makes of every token but the first at every module: [T, M, ...], and its sequence int64 [T]."""
    found: dict[int, torch.Tensor] = {}
    mixed = MixtureModel(model, pool)
    try:
        for rows in like_length([len(tokens) for tokens in sequences]):
            batch, ids = Batch.of([sequences[i] for i in rows], len(pool), pad_token)
            seen: list[torch.Tensor] = []

            def observe(activation: Activation, seen: list[torch.Tensor] = seen) -> None:
                seen.append(look(activation))

            watched = (
                mixed.observed(observe) if owner is None else mixed.routed(_Watched(pool, owner, observe), batch, ids)
            )
            with torch.inference_mode(), watched:
                hidden_states(model, ids, batch)
            stacked = torch.stack(seen, 1)
            for index, row in enumerate(rows):
                found[row] = stacked[index * batch.width + 1 : index * batch.width + len(sequences[row])].clone()
    finally:
        mixed.close()
    lengths = torch.tensor([len(found[i]) for i in range(len(sequences))])
    return (
        torch.cat([found[i] for i in range(len(sequences))]),
        torch.arange(len(sequences)).repeat_interleave(lengths),
    )


class _Watched(OracleRouter):
    """One adapter for everybody, while somebody looks on."""

    def __init__(self, pool: AdapterPool, column: int, observer: Callable[[Activation], None]):
        super().__init__(pool, lambda batch: torch.full((batch.lengths.shape[0],), column))
        self._observer = observer

    def mixture(self, activation: Activation) -> Mixture:
        self._observer(activation)
        return super().mixture(activation)
