"""The calibrated score of every adapter for every token, and the one choice among the permitted."""

import math
from functools import lru_cache

import torch

from seqr.routing.features import features
from seqr.routing.products import score_product

# The least q whose root is taken. Not 0: torch is six times as slow at the root of a zero, which every padding row has.
LEAST = 2.0**-100
# Evidence counts no score beyond this.
CLIP = 6.0


def scores(z: torch.Tensor, gram: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """score_i(z) = (||R_i z|| - mu_i) / sigma_i in fp32 (SEQR paper, section 4.3).

    z [T, r]; gram [N / 64, F, 64], the columns ``features.gram(R_i) / sigma_i^2``; offset [N], mu_i / sigma_i, or NaN
    for an adapter that cannot be used -> [T, N]. Call inside ``ExactFp32``.

    Error: with u = 2^-24 and q = ||R z||^2 / sigma^2, the computed q differs from the true one by less than
    (F + 4) u sum |gram_k| |features_k|, which for an ill-conditioned R can exceed q itself; q is clamped at ``LEAST``.
    """
    return score_product(features(z), gram).clamp_min_(LEAST).sqrt_().sub_(offset)


def usable(score: torch.Tensor) -> torch.Tensor:
    """Where a score is a number: False for NaN and for infinity. Same shape, bool."""
    return score < constant(math.inf, score.dtype, score.device)


def choose(value: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """The allowed column of largest value, per token: value [T, N], allowed [T, N] bool -> int64 [T].

    The mask comes before the maximum, so a column that is not allowed cannot take part, whatever it holds. Ties go to
    the lowest column; -1 where nothing is allowed. ``value`` must be finite wherever ``allowed`` is True.
    """
    nothing = constant(-math.inf, value.dtype, value.device)
    best, column = torch.where(allowed, value, nothing).max(dim=1)
    return column.masked_fill_(best == nothing, -1)


@lru_cache(maxsize=64)
def constant(value: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A number as a tensor of no dimensions. Wrapping a Python number costs more than a small kernel, at every call."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device=device)


@lru_cache(maxsize=64)
def places(count: int, device: torch.device) -> torch.Tensor:
    """int64 [count]: 0, 1, 2, ..."""
    with torch.inference_mode(False):
        return torch.arange(count, device=device)
