"""mu and sigma of every adapter's activation norms, per module: from its own data (the paper) or from public text."""

from dataclasses import dataclass

import torch

from seqr.calibration import RunningMoments
from seqr.routers.pool import AdapterPool


@dataclass(frozen=True)
class Statistics:
    """mu, sigma fp64 [modules, N]."""

    mu: torch.Tensor
    sigma: torch.Tensor

    @classmethod
    def none(cls, pool: AdapterPool) -> "Statistics":
        """mu = 0 and sigma = 1: raw norms."""
        shape = (len(pool.modules), len(pool))
        return cls(torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64))

    def shifted(self, noise: float, seed: int) -> "Statistics":
        """With Gaussian noise of ``noise`` standard deviations sigma added to every mu (SEQR paper, appendix E)."""
        dice = torch.Generator("cpu").manual_seed(seed)
        drawn = torch.randn(self.mu.shape, generator=dice, dtype=torch.float64, device="cpu")
        return Statistics(self.mu + noise * self.sigma * drawn.to(self.mu.device), self.sigma)


class NormMoments:
    """Moments of ||B_i A_i x|| per module and adapter, gathered from activations."""

    def __init__(self, pool: AdapterPool):
        self.pool = pool
        self.moments = [[RunningMoments() for _ in pool.names] for _ in pool.modules]

    def update(self, module: int, norms: torch.Tensor) -> None:
        """norms [T, N] of one module."""
        for column, moments in enumerate(self.moments[module]):
            moments.update(norms[:, column])

    def statistics(self) -> Statistics:
        """What has been gathered so far."""
        mu = torch.tensor([[m.mean for m in row] for row in self.moments], dtype=torch.float64)
        sigma = torch.tensor([[m.std for m in row] for row in self.moments], dtype=torch.float64)
        return Statistics(mu, sigma)
