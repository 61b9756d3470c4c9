"""The exact choice: what fp32 cannot tell apart is decided in fp64, from R, mu and sigma themselves.

The fp32 score s' of an adapter differs from the true one, s = ||R z|| / sigma - mu / sigma, by a bound that is known
before anything is decided. With u = 2^-24, F = r (r + 1) / 2, g the fp32 gram of the library, f the features of z,
q = ||R z||^2 / sigma^2 = g . f and o = mu / sigma:

- q. Rounding g and f to fp32 and adding F products in any order changes q by at most (F + 4) u S with S = sum |g_k f_k|
  (``reference.reference_score_error``). The fp64 steps before that are in the 4: the fp64 gram is off by at most
  r 2^-53 (|R|^T |R|) / sigma^2, entry by entry below r 2^-53 sqrt(G_ii G_jj), so by at most r^2 2^-53 S after z. S is
  |z|^T M |z| with M = |R^T R| / sigma^2, hence S <= lambda ||z||^2 with lambda the largest eigenvalue of M, which is
  below both its Frobenius norm and its largest row sum. Where g, f or their products underflow, each is off by at most
  2^-126 more:

      |q' - q| <= d = c ||z||^2 + a        c = (F + 4) u lambda + F 2^-126,  a = (F + sum |g_k|) 2^-126 + 2^-100

  q' is clamped at ``scores.LEAST`` = 2^-100; as q is not negative, that moves it away from q by no more than that.
- s'. The root is off by one unit in the last place, 2 u (torch takes it from a library of vector functions, which does
  not round it correctly), o and their difference by u each, together at most w = 3.1 u (|s'| + |o|), because the root
  is at most |s'| + |o| (up to second order). So with p = s' + o the true score lies between

      lo = sqrt(max((p - w)^2 - d, 0)) - o        and        hi = sqrt((p + w)^2 + d) - o      (p - w not below 0)

  near q = 0, too, where the root of d and not d itself is the error.

An adapter whose hi is below another's lo is not the choice; every other one is computed again in fp64, from R in fp32
as the adapter holds it (its fp32 gram has lost what an ill-conditioned R is about) and from mu and sigma in fp64.

For most tokens one comparison shows that no such doubt exists. Let D, A be the largest c and a of the library, L its
smallest o and omax its largest |o|; b = s'_best + L, b2 = max(s'_second + L, b / 2). Every p but the best is at most
s'_second + w + o <= b2 + w - L + o, and hi grows with p, so hi <= b2 - L + w + d / (2 b2); and
lo_best >= s'_best - w - d / b2. The best is therefore the choice when

      (b - b2 - K) b2 > 6 D ||z||^2 + 8 A        K = 24 u omax

(1.5 d / b2 for the two errors of q, and 2 w <= 6.2 u (|s'_best| + 2 omax) <= 6.2 u b + 18.6 u omax. The part of it that
grows with b, 12.4 u b2^2 after the product, is below 2.5 D ||z||^2, because (F + 4) u q <= D ||z||^2 for every adapter;
the rest of the 6 covers the rounding of this comparison itself.)

The bits of the answer depend on R, mu, sigma and z of permitted adapters only: D, A, L and omax are of all adapters,
but they decide no more than whether a token is looked at twice.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from seqr.routing.features import feature_count
from seqr.routing.products import COLUMN_BLOCK
from seqr.routing.scores import LEAST

Flags = npt.NDArray[np.bool_]

UNIT = 2.0**-24
TINY = 2.0**-126
_PAIRS_AT_ONCE = 1 << 15
_COLUMNS_AT_ONCE = 1 << 12


@dataclass(frozen=True)
class Truth:
    """What the scores of one module's N columns are rounded from, and how far they may be off.

    r fp32 [N, r, r], mu and sigma fp64 [N]; slope c and floor a fp64 [N], see above; worst_slope, worst_floor, lowest
    and widest: D, A, L and omax. A column that cannot be used has R = 0, mu = 0, sigma = 1 and counts in none of them.
    """

    r: torch.Tensor
    mu: torch.Tensor
    sigma: torch.Tensor
    slope: torch.Tensor
    floor: torch.Tensor
    worst_slope: float
    worst_floor: float
    lowest: float
    widest: float

    @cached_property
    def arrays(self) -> tuple[npt.NDArray[Any], ...]:
        """For compiled code, on a CPU: (L, omax, D, A) fp64 [4], r, mu and sigma."""
        limits = np.array([self.lowest, self.widest, self.worst_slope, self.worst_floor])
        return limits, self.r.contiguous().numpy(), self.mu.numpy(), self.sigma.numpy()

    @classmethod
    def of(
        cls,
        r: torch.Tensor,
        mu: torch.Tensor,
        sigma: torch.Tensor,
        usable: torch.Tensor,
        known: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> "Truth":
        """r [N, r, r] of any float dtype, mu and sigma [N], usable bool [N]; all on one device.

        ``known``: the ``bounds`` of r and sigma, fp64 [N] each, where they have been computed before.
        """
        r = torch.where(usable[:, None, None], r, 0.0).to(torch.float32)
        mu = torch.where(usable, mu, 0.0).to(torch.float64)
        sigma = torch.where(usable, sigma, 1.0).to(torch.float64)
        slope, floor = bounds(r, sigma) if known is None else (bound.to(r.device) for bound in known)
        offset = (mu / sigma)[usable]
        some = bool(usable.any())
        return cls(
            r,
            mu,
            sigma,
            slope,
            floor,
            worst_slope=float(slope.max()) if some else 0.0,
            worst_floor=float(floor.max()) if some else 0.0,
            lowest=float(offset.min()) if some else 0.0,
            widest=float(offset.abs().max()) if some else 0.0,
        )


def bounds(r: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """c and a of |q' - q| <= c ||z||^2 + a, fp64 [N] each: r [N, r, r], sigma fp64 [N]."""
    slopes, floors, count = [], [], feature_count(r.shape[1])
    for some, its in zip(torch.split(r, _COLUMNS_AT_ONCE), torch.split(sigma, _COLUMNS_AT_ONCE), strict=True):
        wide = some.to(torch.float64) / its[:, None, None]
        size = (wide.transpose(1, 2) @ wide).abs()
        largest = torch.minimum(torch.linalg.matrix_norm(size), size.sum(2).amax(1))
        slopes.append((count + 4) * UNIT * largest * (1.0 + 1e-6) + count * TINY)
        floors.append((count + size.sum((1, 2))) * TINY + LEAST)
    return torch.cat(slopes), torch.cat(floors)


def doubtful(z: torch.Tensor, best: torch.Tensor, second: torch.Tensor, truth: Truth) -> Flags:
    """bool [T]: where ``best`` may not be the true choice, ``second`` being the largest score of any other column.

    z fp32 [T, r]; best and second fp32 [T], -inf where there is none. A best that is no number is always in doubt.
    In NumPy, where an operation on few numbers costs a third of torch's.
    """
    wide, high, next_high = (t.cpu().numpy() for t in (z, best, second))
    with np.errstate(invalid="ignore", over="ignore"):
        b = np.maximum(high + truth.lowest, 0.0)
        b2 = np.maximum(next_high + truth.lowest, b * 0.5)
        need = np.einsum("tr,tr->t", wide, wide) * (6.0 * truth.worst_slope) + 8.0 * truth.worst_floor
        doubt: Flags = ~((b - b2 - 24.0 * UNIT * truth.widest) * b2 > need)
    return doubt


def margin(z: torch.Tensor, best: torch.Tensor, truth: Truth) -> torch.Tensor:
    """How far below ``best`` an fp32 score may be and still be the largest true one: z [T, r], best [T] -> [T] fp32.

    hi - s' and s' - lo are at most w + sqrt(d), whatever q is: wide, and enough to leave few columns of many.
    """
    most = z.square().sum(1).mul_(truth.worst_slope).add_(truth.worst_floor).sqrt_()
    return most.add_(best.abs(), alpha=4.0 * UNIT).add_(8.0 * UNIT * truth.widest).mul_(2.0 + 2.0**-10)


def settle(z: torch.Tensor, score: torch.Tensor, truth: Truth) -> torch.Tensor:
    """The exact choice, token by token: int64 [T], the lowest column among true equals, -1 where nothing is allowed.

    z fp32 [T, r]; score fp32 [T, N], -inf where a column is not allowed and finite elsewhere.
    """
    best = score.amax(1)
    near = (score >= (best - margin(z, best, truth))[:, None]) & (score > -math.inf)
    token, column = near.nonzero(as_tuple=True)
    return settle_pairs(z, score[token, column], token, column, truth)


def settle_pairs(
    z: torch.Tensor, score: torch.Tensor, token: torch.Tensor, column: torch.Tensor, truth: Truth
) -> torch.Tensor:
    """``settle`` from K pairs of a token and a column that may win there, with their scores: int64 [T], or -1."""
    low, high = interval(z, score, token, column, truth)
    floor = low.new_full((z.shape[0],), -math.inf).scatter_reduce_(0, token, low, "amax")
    kept = high >= floor.index_select(0, token)
    return best_pairs(z, token[kept], column[kept], truth)


def interval(
    z: torch.Tensor, score: torch.Tensor, token: torch.Tensor, column: torch.Tensor, truth: Truth
) -> tuple[torch.Tensor, torch.Tensor]:
    """lo and hi of K pairs, fp64 [K]: score fp32 [K], finite; token and column int64 [K]; z fp32 [T, r]."""
    offset = truth.mu.index_select(0, column) / truth.sigma.index_select(0, column)
    wide = score.to(torch.float64)
    root, rounding = wide + offset, 3.1 * UNIT * (wide.abs() + offset.abs())
    size = z.to(torch.float64).square().sum(1).index_select(0, token)
    d = truth.slope.index_select(0, column) * size + truth.floor.index_select(0, column)
    high = ((root + rounding).clamp_min_(0.0).square_() + d).sqrt_() - offset
    low = ((root - rounding).clamp_min_(0.0).square_() - d).clamp_min_(0.0).sqrt_() - offset
    return low, high


def true_scores(z: torch.Tensor, columns: torch.Tensor, truth: Truth) -> torch.Tensor:
    """(||R z|| - mu) / sigma in fp64 for pairs of a token and a column: z fp32 [K, r], columns int64 [K] -> [K].

    Added up in one fixed order, one rounding per operation: the same bits as ``reference.oracle_score``, whatever the
    pair's neighbours, on every device.
    """
    r, z64 = truth.r.index_select(0, columns).to(torch.float64), z.to(torch.float64)
    rank = z.shape[1]
    y = r[:, :, 0] * z64[:, :1]
    for j in range(1, rank):
        y += r[:, :, j] * z64[:, j : j + 1]
    y *= y
    total = y[:, 0].clone()
    for i in range(1, rank):
        total += y[:, i]
    return (_root(total) - truth.mu.index_select(0, columns)) / truth.sigma.index_select(0, columns)


def _root(x: torch.Tensor) -> torch.Tensor:
    # On CPUs torch's root is not the nearest fp64 number; NumPy's is, as IEEE 754 and Python have it.
    return torch.from_numpy(np.sqrt(x.numpy())) if x.device.type == "cpu" else x.sqrt()


def best_pairs(z: torch.Tensor, token: torch.Tensor, column: torch.Tensor, truth: Truth) -> torch.Tensor:
    """Of pairs (token, column), the column of largest true score for each of the T tokens of z: int64 [T], or -1."""
    exact = torch.cat(
        [
            true_scores(z.index_select(0, some), of, truth)
            for some, of in zip(torch.split(token, _PAIRS_AT_ONCE), torch.split(column, _PAIRS_AT_ONCE), strict=True)
        ]
    )
    best = exact.new_full((z.shape[0],), -math.inf).scatter_reduce_(0, token, exact, "amax")
    won = exact == best.index_select(0, token)
    nobody = truth.r.shape[0] + COLUMN_BLOCK
    choice = token.new_full((z.shape[0],), nobody).scatter_reduce_(0, token[won], column[won], "amin")
    return choice.masked_fill_(choice == nobody, -1)
