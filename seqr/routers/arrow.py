"""ARROW: the adapter whose first right singular vector is most aligned with the input (Ostapenko et al. 2024)."""

import torch

from seqr.routers.interface import Activation, Mixture, ScoreRouter
from seqr.routers.norms import Spectrum
from seqr.routers.pool import AdapterPool


class ArrowRouter(ScoreRouter):
    """score_i = |v_i^T x|; the ``top_k`` best are mixed by a softmax of their scores over ``temperature``.

    One adapter, as the SEQR paper compares it, is ``top_k`` = 1; peft's default is 3 with temperature 1.
    """

    name = "arrow"

    def __init__(self, pool: AdapterPool, spectrum: Spectrum | None = None, top_k: int = 1, temperature: float = 1.0):
        super().__init__(pool)
        self._spectrum = spectrum or Spectrum(pool)
        self._top_k = top_k
        self._temperature = temperature

    def scores(self, activation: Activation) -> torch.Tensor:
        return self._spectrum.arrows(activation)

    def mixture(self, activation: Activation) -> Mixture:
        if self._top_k == 1:
            return super().mixture(activation)
        score = self.scores(activation)
        score = score.masked_fill(~self.batch.allowed | score.isnan(), -torch.inf)
        best, columns = score.topk(min(self._top_k, len(self.pool)), dim=1)
        weights = torch.softmax(best / self._temperature, dim=1).nan_to_num(0.0)
        return Mixture(columns.masked_fill(best == -torch.inf, -1), weights)
