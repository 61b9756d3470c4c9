"""Adapters and tokens made to be hard to tell apart, and an fp64 oracle fast enough for millions of them."""

import math

import numpy as np
import numpy.typing as npt
import torch

from seqr.bench.routing.adapters import Shelf

Float64 = npt.NDArray[np.float64]


def triangular(rank: int, condition: float, generator: torch.Generator) -> torch.Tensor:
    """fp32 [r, r], upper triangular, with singular values from 1 down to 1 / condition."""
    left, right = (
        torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64))[0] for _ in range(2)
    )
    values = torch.logspace(0, -math.log10(condition), rank, dtype=torch.float64)
    r: torch.Tensor = torch.linalg.qr((left * values) @ right)[1]
    return r.to(torch.float32).triu()


def assorted(rank: int, count: int, condition: float, generator: torch.Generator) -> Shelf:
    """``count`` unrelated adapters of that condition."""
    r = torch.stack([triangular(rank, condition, generator) for _ in range(count)])
    return Shelf.calibrated([r], torch.randn(500, rank, generator=generator))


def twins(rank: int, count: int, gap: float, condition: float, generator: torch.Generator) -> Shelf:
    """``count`` adapters that differ by a relative ``gap`` in every entry of R (0.0: not at all); one mu and sigma."""
    first = assorted(rank, 1, condition, generator)
    r = first.r.repeat(count, 1, 1)
    r = r * (1.0 + gap * torch.randn(r.shape, generator=generator))
    return Shelf.of(r, first.mu.repeat(count), first.sigma.repeat(count))


def crossings(shelf: Shelf, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """z fp32 [T, r] at which two of the adapters score the same, as nearly as fp32 can say it.

    Bisection in fp64 along the line between a token that one of the two wins and a token that the other wins.
    """
    count, rank = shelf.r.shape[0], shelf.r.shape[1]
    pick = torch.randint(count, (2, tokens), generator=generator)
    sides = [(shelf.r[side].to(torch.float64), shelf.mu[side], shelf.sigma[side]) for side in pick]

    def first_leads(z: torch.Tensor) -> torch.Tensor:
        one, other = (((r @ z[:, :, None]).squeeze(2).norm(dim=1) - mu) / sigma for r, mu, sigma in sides)
        leads: torch.Tensor = one > other
        return leads[:, None]

    low, high = (torch.randn(tokens, rank, generator=generator, dtype=torch.float64) for _ in range(2))
    swap = first_leads(low)
    low, high = torch.where(swap, high, low), torch.where(swap, low, high)
    for _ in range(60):
        middle = (low + high) / 2
        leads = first_leads(middle)
        low, high = torch.where(leads, low, middle), torch.where(leads, middle, high)
    return low.to(torch.float32)


def cancelled(shelf: Shelf, tokens: int, generator: torch.Generator) -> torch.Tensor:
    """z fp32 [T, r] that the first adapter nearly cancels, of sizes from 1e-6 to 1e6."""
    rank = shelf.r.shape[1]
    last: torch.Tensor = torch.linalg.svd(shelf.r[0].to(torch.float64))[2][-1].to(torch.float32)
    size = 10.0 ** (12.0 * torch.rand(tokens, 1, generator=generator) - 6.0)
    return last * size * (1.0 + 1e-7 * torch.randn(tokens, rank, generator=generator))


def oracle(shelf: Shelf, z: torch.Tensor, permitted: torch.Tensor) -> tuple[npt.NDArray[np.int64], Float64]:
    """argmax of ``seqr.routing.reference.oracle_score`` over the permitted, and its lead over the next: [T] each.

    The same operations in the same order for all tokens at once, in NumPy. z fp32 [T, r], permitted bool [T, N']; -1
    where nothing is permitted, ties to the lowest. The lead is infinite where there is no other.
    """
    tokens, wide = z.shape[0], z.to(torch.float64).numpy()
    best, lead, choice = np.full(tokens, -np.inf), np.full(tokens, np.inf), np.full(tokens, -1, dtype=np.int64)
    for i in range(shelf.r.shape[0]):
        if not bool(shelf.usable[i]):
            continue
        score = _scores(shelf.r[i].to(torch.float64).numpy(), float(shelf.mu[i]), float(shelf.sigma[i]), wide)
        score[~permitted[:, i].numpy()] = -np.inf
        with np.errstate(invalid="ignore"):
            lead = np.where(score > best, score - best, np.minimum(lead, best - score))
        wins = score > best
        best[wins], choice[wins] = score[wins], i
    return choice, lead


def _scores(r: Float64, mu: float, sigma: float, z: Float64) -> Float64:
    columns = [np.ascontiguousarray(z[:, j]) for j in range(z.shape[1])]
    total = np.zeros(0)
    for i, row in enumerate(r):
        y = row[0] * columns[0]
        for a, column in zip(row[1:], columns[1:], strict=True):
            y += a * column
        y *= y
        total = y if i == 0 else total + y
    scores: Float64 = (np.sqrt(total) - mu) / sigma
    return scores
