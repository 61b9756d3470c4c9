"""Routing per token and accumulated evidence in fp64, one token and one adapter at a time.

What every faster form is tested against. Slow and obvious on purpose; nothing in the product calls it. R, mu and sigma
are per adapter, in column order.
"""

import math
from collections.abc import Sequence

import torch

from seqr.routing.scores import CLIP

UNIT = 2.0**-24  # the largest relative error of one fp32 rounding


def reference_score(r: torch.Tensor, mu: float, sigma: float, z: torch.Tensor) -> float:
    """(||R z|| - mu) / sigma for one adapter r [r, r] and one token z [r]; NaN when sigma is not positive."""
    if not sigma > 0.0:
        return math.nan
    return (math.sqrt(float((r.double() @ z.double()).square().sum())) - mu) / sigma


def oracle_score(r: Sequence[Sequence[float]], mu: float, sigma: float, z: Sequence[float]) -> float:
    """``reference_score`` with every operation spelled out, so that its bits are defined: plain fp64, left to right.

    r: r rows of r numbers and z: r numbers, fp32 values; sigma positive. The exact choice is the argmax of this.
    """
    squares = []
    for row in r:
        y = row[0] * z[0]
        for a, b in zip(row[1:], z[1:], strict=True):
            y += a * b
        squares.append(y * y)
    total = squares[0]
    for square in squares[1:]:
        total += square
    return (math.sqrt(total) - mu) / sigma


def reference_score_error(r: torch.Tensor, mu: float, sigma: float, z: torch.Tensor) -> float:
    """How far ``seqr.routing.scores.scores`` in fp32 may be from ``reference_score``, for the same fp32 z.

    Let q = ||R z||^2 / sigma^2 = sum over k of g_k f_k, with F = r (r + 1) / 2 terms, and u = 2^-24. Rounding g_k and
    f_k to fp32 costs u each and adding F products in any order at most F u, all relative to S = sum |g_k f_k|:

        |q' - q| <= d = (F + 4) u S + 2^-100     (the 4 covers the second order and the fp64 steps before)

    The square root turns that into at most d / sqrt(q), or sqrt(d) when q is near 0; it (by up to 2 u), the offset
    mu / sigma, and their difference are each rounded once more. S may be far above q when R is ill-conditioned: then
    R z nearly cancels and the bound is honest about it.
    """
    from seqr.routing.features import gram
    from seqr.routing.scores import LEAST

    z64 = z.double()
    pairs = torch.triu_indices(z.shape[0], z.shape[0])
    terms = gram(r) / (sigma * sigma) * z64[pairs[0]] * z64[pairs[1]]
    q = max(float(terms.sum()), 0.0)
    d = (terms.shape[0] + 4) * UNIT * float(terms.abs().sum()) + LEAST
    root = math.sqrt(q)
    root_error = math.sqrt(q + d) - math.sqrt(max(q - d, 0.0))
    return root_error + UNIT * (2.0 * (root + root_error) + 2.0 * abs(mu / sigma) + abs(root - mu / sigma))


def reference_choice(values: Sequence[float], permitted: Sequence[bool]) -> int:
    """The permitted index of the largest finite value, the lowest one among equals; -1 when there is none."""
    best = -1
    for index, (value, allowed) in enumerate(zip(values, permitted, strict=True)):
        if allowed and math.isfinite(value) and (best < 0 or value > values[best]):
            best = index
    return best


def reference_evidence(scores: Sequence[Sequence[Sequence[float]]]) -> list[list[list[float]]]:
    """value[l][t][i] of one whole sequence from its scores[l][t][i], over modules l in forward order, tokens t from 0.

    The mean of module l's clipped scores over positions 1..t, added up over the modules up to l; a score that is not
    finite counts as -6, and its value is NaN there: it cannot be chosen. At position 0 there is no evidence: all NaN.
    """
    tokens, adapters = len(scores[0]), len(scores[0][0])
    depth = [[0.0] * adapters for _ in range(tokens)]
    values = []
    for module in scores:
        at_module = []
        for t in range(tokens):
            row = []
            for i in range(adapters):
                seen = [_clip(module[u][i]) for u in range(1, t + 1)]
                if seen:
                    depth[t][i] += sum(seen) / len(seen)
                row.append(depth[t][i] if seen and math.isfinite(module[t][i]) else math.nan)
            at_module.append(row)
        values.append(at_module)
    return values


def reference_standing(scores: Sequence[Sequence[Sequence[float]]]) -> list[float]:
    """What a whole prompt says for each adapter, from scores[l][t][i]: the sum over modules and tokens from 1 on of the
    clipped score, a token counting half as much as the one six places after it.
    """
    last = len(scores[0]) - 1
    return [
        sum(0.5 ** ((last - t) / 6) * _clip(module[t][i]) for module in scores for t in range(1, last + 1))
        for i in range(len(scores[0][0]))
    ]


def _clip(score: float) -> float:
    return max(-CLIP, min(CLIP, score)) if math.isfinite(score) else -CLIP


def reference_output(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    factors: Sequence[tuple[torch.Tensor, torch.Tensor]],
    choices: Sequence[int],
) -> torch.Tensor:
    """y = W x + Q_i R_i A x, token by token, in fp64.

    x [T, n], weight [m, n], a [r, n], factors: (Q [m, r], R [r, r]) per adapter, choices: i per token or -1 -> [T, m].
    """
    rows = []
    for token, choice in zip(x.double(), choices, strict=True):
        y = weight.double() @ token
        if bias is not None:
            y = y + bias.double()
        if choice >= 0:
            q, r = factors[choice]
            y = y + q.double() @ (r.double() @ (a.double() @ token))
        rows.append(y)
    return torch.stack(rows)
