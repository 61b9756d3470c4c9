"""Libraries and tokens made to be hard to tell apart, and the fp64 oracle over them, one token at a time."""

import math
from dataclasses import dataclass

import torch

from seqr.routing.exact import Truth
from seqr.routing.features import feature_count, gram
from seqr.routing.per_token import Columns
from seqr.routing.products import COLUMN_BLOCK, column_blocks
from seqr.routing.reference import oracle_score, reference_choice


@dataclass(frozen=True)
class Hard:
    """Some adapters as fp32 R [N, r, r] with mu, sigma fp64 [N], and what a library makes of them."""

    r: torch.Tensor
    mu: torch.Tensor
    sigma: torch.Tensor
    columns: Columns
    truth: Truth

    @classmethod
    def of(cls, r: torch.Tensor, mu: torch.Tensor, sigma: torch.Tensor) -> "Hard":
        count, rank = r.shape[0], r.shape[1]
        width = -(-count // COLUMN_BLOCK) * COLUMN_BLOCK
        grams, offset = torch.zeros(width, feature_count(rank)), torch.zeros(width)
        usable = torch.zeros(width, dtype=torch.bool)
        for i in range(count):
            usable[i] = bool(r[i].isfinite().all()) and math.isfinite(mu[i]) and bool(sigma[i] > 0.0)
            if usable[i]:
                grams[i], offset[i] = gram(r[i]) / sigma[i] / sigma[i], mu[i] / sigma[i]
            else:
                offset[i] = math.nan
        wide_r = torch.zeros(width, rank, rank)
        wide_mu, wide_sigma = (torch.zeros(width, dtype=torch.float64) for _ in range(2))
        wide_r[:count], wide_mu[:count], wide_sigma[:count] = r, mu, sigma
        return cls(r, mu, sigma, Columns(column_blocks(grams), offset), Truth.of(wide_r, wide_mu, wide_sigma, usable))

    def oracle(self, z: torch.Tensor, permitted: torch.Tensor) -> list[int]:
        """argmax over the permitted of the fp64 score, token by token, in Python's own numbers."""
        choices = []
        rows, mu, sigma = self.r.tolist(), self.mu.tolist(), self.sigma.tolist()
        for token, allowed in zip(z.tolist(), permitted.tolist(), strict=True):
            values = [
                oracle_score(r, m, s, token) if s > 0.0 else math.nan for r, m, s in zip(rows, mu, sigma, strict=True)
            ]
            choices.append(reference_choice(values, allowed[: len(values)]))
        return choices


def triangular(rank: int, condition: float, generator: torch.Generator) -> torch.Tensor:
    """fp32 [r, r] upper triangular with singular values from 1 down to 1 / condition."""
    left, right = (
        torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64))[0] for _ in range(2)
    )
    values = torch.logspace(0, -math.log10(condition), rank, dtype=torch.float64)
    return torch.linalg.qr((left * values) @ right)[1].to(torch.float32).triu()


def calibrated(r: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """mu, sigma fp64 [N] of ||R z|| over 500 normal z."""
    z = torch.randn(500, r.shape[1], generator=generator, dtype=torch.float64)
    norms = torch.einsum("nij,tj->nti", r.to(torch.float64), z).norm(dim=2)
    return norms.mean(1), norms.std(1)


def twins(rank: int, count: int, gap: float, condition: float, generator: torch.Generator) -> Hard:
    """``count`` adapters that differ from one another by a relative ``gap`` in every entry; 0.0 makes them equal."""
    r = triangular(rank, condition, generator).repeat(count, 1, 1)
    r = r * (1.0 + gap * torch.randn(r.shape, generator=generator))
    mu, sigma = calibrated(r[:1], generator)
    return Hard.of(r, mu.repeat(count), sigma.repeat(count))


def crossings(hard: Hard, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """z fp32 [T, r] at which two of the adapters score the same, as nearly as fp32 can say it.

    Bisection in fp64 along the line between a token that one of the two wins and a token that the other wins.
    """
    rank, count = hard.r.shape[1], hard.r.shape[0]
    r, mu, sigma = hard.r.to(torch.float64), hard.mu, hard.sigma
    pick = torch.randint(count, (2, tokens), generator=generator)

    def difference(z: torch.Tensor) -> torch.Tensor:
        first, second = ((torch.einsum("tij,tj->ti", r[side], z).norm(dim=1) - mu[side]) / sigma[side] for side in pick)
        return first - second

    low, high = (torch.randn(tokens, rank, generator=generator, dtype=torch.float64) for _ in range(2))
    swap = difference(low) > 0
    low, high = torch.where(swap[:, None], high, low), torch.where(swap[:, None], low, high)
    for _ in range(60):
        middle = (low + high) / 2
        above = difference(middle)[:, None] > 0
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return low.to(torch.float32)
