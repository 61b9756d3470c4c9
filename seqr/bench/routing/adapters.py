"""Libraries of any size for one module: R, mu and sigma, and what routing makes of them."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from seqr.routing.exact import Truth
from seqr.routing.features import features, gram
from seqr.routing.per_token import Columns
from seqr.routing.products import COLUMN_BLOCK, column_blocks

_AT_ONCE = 1 << 12


@dataclass(frozen=True)
class Shelf:
    """N adapters in one module: r fp32 [N, r, r], mu and sigma fp64 [N]; columns and truth as a library holds them.

    usable bool [N'], with N' = N rounded up to a multiple of 64: False for padding and for what is not finite.
    """

    r: torch.Tensor
    mu: torch.Tensor
    sigma: torch.Tensor
    usable: torch.Tensor
    columns: Columns
    truth: Truth

    @classmethod
    def of(cls, r: torch.Tensor, mu: torch.Tensor, sigma: torch.Tensor) -> "Shelf":
        """r fp32 [N, r, r], mu, sigma fp64 [N]. What is not finite, or has a sigma <= 0, is unusable."""
        usable = r.isfinite().all(2).all(1) & mu.isfinite() & (sigma > 0.0)
        width = -(-max(1, r.shape[0]) // COLUMN_BLOCK) * COLUMN_BLOCK
        usable, wide_r, wide_mu, wide_sigma = (_padded(t, width) for t in (usable, r, mu, sigma))
        truth = Truth.of(wide_r, wide_mu, wide_sigma, usable)
        grams = torch.cat([vech(truth.r[k], truth.sigma[k]) for k in torch.split(torch.arange(width), _AT_ONCE)])
        offset = (truth.mu / truth.sigma).to(torch.float32).masked_fill_(~usable, torch.nan)
        return cls(r, mu, sigma, usable, Columns(column_blocks(grams.to(torch.float32)), offset), truth)

    @classmethod
    def calibrated(cls, chunks: Iterable[torch.Tensor], z: torch.Tensor) -> "Shelf":
        """r fp32 [*, r, r] in chunks, with the mean and deviation of ||R z|| over z fp32 [S, r]."""
        of_z = features(z.to(torch.float64)).T
        r, mu, sigma = [], [], []
        for chunk in chunks:
            for part in torch.split(chunk, _AT_ONCE):
                norms = (vech(part, torch.ones(part.shape[0])) @ of_z).clamp_min_(0.0).sqrt_()
                r.append(part)
                mu.append(norms.mean(1))
                sigma.append(norms.std(1))
        return cls.of(torch.cat(r), torch.cat(mu), torch.cat(sigma))

    def everyone(self, tokens: int) -> torch.Tensor:
        """bool [T, N']: all usable adapters permitted to every token."""
        return self.usable.expand(tokens, -1).clone()


def random_shelf(count: int, rank: int, seed: int = 0) -> Shelf:
    """``count`` upper triangular R of normal entries, calibrated on 256 normal z."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(256, rank, generator=generator)
    sizes = [min(_AT_ONCE, count - start) for start in range(0, max(1, count), _AT_ONCE)]
    return Shelf.calibrated((torch.randn(size, rank, rank, generator=generator).triu() for size in sizes), z)


def vech(r: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Grams as a library scales them: r [K, r, r], sigma [K] -> fp64 [K, F] of R^T R / sigma^2."""
    return gram(r.to(torch.float64) / sigma.to(torch.float64)[:, None, None])


def _padded(t: torch.Tensor, width: int) -> torch.Tensor:
    return torch.cat([t, t.new_zeros(width - t.shape[0], *t.shape[1:])])
