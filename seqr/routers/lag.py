"""LAG: ARROW keeps k adapters, SPECTR chooses among them (Fleshman and Van Durme 2025a)."""

import torch

from seqr.routers.interface import Activation, ScoreRouter
from seqr.routers.norms import Spectrum
from seqr.routers.pool import AdapterPool
from seqr.routers.statistics import Statistics


class LagRouter(ScoreRouter):
    """The largest (||S_i V_i^T x|| - mu_i) / sigma_i among the ``k`` permitted adapters of largest |v_i^T x|.

    k = 1 is ARROW, k = N is SPECTR. The paper uses k = 20 of 1,000 and k = 3 of 10. The choice is LAG's; its saving is
    not, for here every norm is computed and those outside the k are left out.
    """

    name = "lag"

    def __init__(
        self, pool: AdapterPool, k: int = 3, statistics: Statistics | None = None, spectrum: Spectrum | None = None
    ):
        super().__init__(pool)
        if k < 1:
            raise ValueError(f"LAG keeps at least one adapter, got k = {k}")
        statistics = statistics or Statistics.none(pool)
        self._k = k
        self._spectrum = spectrum or Spectrum(pool)
        self._mu, self._sigma = statistics.mu.to(torch.float32), statistics.sigma.to(torch.float32)

    def scores(self, activation: Activation) -> torch.Tensor:
        arrows = self._spectrum.arrows(activation)
        arrows = arrows.masked_fill(~self.batch.allowed | arrows.isnan(), -torch.inf)
        kept = arrows.topk(min(self._k, arrows.shape[1]), dim=1).indices
        mu, sigma = self._mu[activation.module], self._sigma[activation.module]
        score = (self._spectrum.norms(activation) - mu) / sigma
        outside = torch.ones_like(score, dtype=torch.bool).scatter_(1, kept, False)
        return score.masked_fill(outside, -torch.inf)
