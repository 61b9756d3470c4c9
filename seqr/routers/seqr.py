"""SEQR: per token and module, the adapter of largest calibrated activation norm (SEQR paper, algorithm 1)."""

import torch

from seqr.routers.interface import Activation, ScoreRouter
from seqr.routers.norms import SquaredNorms
from seqr.routers.pool import AdapterPool
from seqr.routers.statistics import Statistics


class SeqrRouter(ScoreRouter):
    """score_i = (||R_i z|| - mu_i) / sigma_i, z = A x; without statistics the raw norm, sigma_i = 1 and mu_i = 0.

    An adapter whose sigma is not positive is never chosen.
    """

    name = "seqr"

    def __init__(self, pool: AdapterPool, statistics: Statistics | None = None):
        super().__init__(pool)
        statistics = statistics or Statistics.none(pool)
        self._usable = statistics.sigma > 0.0
        sigma = torch.where(self._usable, statistics.sigma, torch.ones_like(statistics.sigma))
        self._squared = SquaredNorms(pool, sigma)
        self._offset = (statistics.mu / sigma).masked_fill(~self._usable, torch.nan).to(torch.float32)

    def scores(self, activation: Activation) -> torch.Tensor:
        return self._squared(activation).sqrt() - self._offset[activation.module]
