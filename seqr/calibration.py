"""mu and sigma of the activation norms ||R z||, in one streaming pass (SEQR paper, section 4.3)."""

import math
from dataclasses import dataclass

import torch


@dataclass
class RunningMoments:
    """Mean and standard deviation of a stream of numbers, in fp64, without keeping them.

    Welford's recurrence over batches (Chan, Golub and LeVeque 1979): no difference of large sums, so a small deviation
    around a large mean survives. The order of the batches changes the last bits only.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared deviations from the mean

    def update(self, values: torch.Tensor) -> None:
        """Take in every element of ``values`` (any shape, any float dtype; an empty tensor changes nothing)."""
        if values.numel() == 0:
            return
        wide = values.detach().to(torch.float64)
        mean = float(wide.mean())
        self.merge(RunningMoments(wide.numel(), mean, float((wide - mean).square().sum())))

    def merge(self, other: "RunningMoments") -> None:
        """Take in everything that ``other`` has seen."""
        if other.count == 0:
            return
        total = self.count + other.count
        shift = other.mean - self.mean
        self.mean += shift * (other.count / total)
        self.squares += other.squares + shift * shift * (self.count * other.count / total)
        self.count = total

    @property
    def std(self) -> float:
        """The population standard deviation; 0 before the second number."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0


def norms(r: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """||R z|| of every token, in fp64: r [r, r], z [T, r] -> [T]."""
    return (z.to(torch.float64) @ r.to(z.device, torch.float64).T).square().sum(dim=1).sqrt()
