"""SPECTR: the adapter of largest activation norm, by all right singular vectors (Fleshman and Van Durme 2025b)."""

import torch

from seqr.routers.interface import Activation, ScoreRouter
from seqr.routers.norms import Spectrum
from seqr.routers.pool import AdapterPool
from seqr.routers.statistics import Statistics


class SpectrRouter(ScoreRouter):
    """score_i = (||S_i V_i^T x|| - mu_i) / sigma_i; without statistics the raw norm.

    The fair form for a shared A: the published ||V_i^T x|| is the norm of the projection on A's row space, which all
    adapters that share A have in common.
    """

    name = "spectr"

    def __init__(self, pool: AdapterPool, statistics: Statistics | None = None, spectrum: Spectrum | None = None):
        super().__init__(pool)
        statistics = statistics or Statistics.none(pool)
        self._spectrum = spectrum or Spectrum(pool)
        self._mu, self._sigma = statistics.mu.to(torch.float32), statistics.sigma.to(torch.float32)

    def scores(self, activation: Activation) -> torch.Tensor:
        module = activation.module
        return (self._spectrum.norms(activation) - self._mu[module]) / self._sigma[module]
