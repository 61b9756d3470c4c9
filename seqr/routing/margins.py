"""How far a choice lay above the next one that was permitted, for the few tokens whose attribution is asked for."""

import math
from collections.abc import Sequence

import torch

from seqr.routing.scores import constant


def lead(value: torch.Tensor, allowed: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """value [A, N], allowed [A, N] bool, column int64 [A] (the choice, or -1) -> [A] of value's dtype.

    The value of the choice less the largest of any other allowed column; not below 0, as an exact choice may lie a
    rounding below its rival. NaN where nobody was chosen or nobody else was allowed. Columns that are not allowed take
    no part, whatever they hold.
    """
    nothing = constant(-math.inf, value.dtype, value.device)
    chosen = column.clamp_min(0)[:, None]
    best = value.gather(1, chosen)[:, 0]
    rival = torch.where(allowed, value, nothing).scatter(1, chosen, -math.inf).amax(1)
    missing = (column < 0) | (rival == nothing)
    return (best - rival).clamp_min(0.0).masked_fill(missing, math.nan)


def mean_leads(leads: Sequence[torch.Tensor]) -> list[float | None]:
    """M modules' leads [A] -> for each of the A tokens the mean over the modules that have one, or None."""
    means = torch.stack(list(leads)).to(torch.float64).nanmean(0).tolist()
    return [None if math.isnan(mean) else mean for mean in means]
