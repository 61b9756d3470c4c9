"""Per-token routing: the paper's, provably the largest calibrated activation norm (SEQR paper, theorem 3.3)."""

import torch

from seqr.routing.scores import choose, usable


def route(score: torch.Tensor, permitted: torch.Tensor) -> torch.Tensor:
    """argmax of the score over the permitted set, token by token.

    score [T, N] fp32, permitted [T, N] bool -> int64 [T]: the column, or -1 where nothing is permitted. A score that is
    not finite never wins; ties go to the lowest column.
    """
    return choose(score, permitted & usable(score))
