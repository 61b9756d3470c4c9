"""Confidence intervals and paired tests over rows: how sure a difference between two routers is."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

DRAWS = 20_000

Float64 = npt.NDArray[np.float64]


def wilson(right: int, rows: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% interval of a share of right answers (Wilson 1927); (0, 1) for no rows."""
    if rows == 0:
        return 0.0, 1.0
    share, spread = right / rows, z * z / rows
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / rows + spread / 4 / rows) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_p(differences: Sequence[Float64], seed: int = 0, draws: int = DRAWS) -> float:
    """Two-sided p of a paired sign-flip permutation test: could methods that are alike differ so much on average?

    differences: per task, each row's difference between two methods, averaged over seeds and divided by the task's
    oracle accuracy where percent of oracle is compared. The statistic is the mean over tasks of the mean over rows;
    under the null each row's sign is a coin. Rows are the units, so seeds, which share rows, are not counted twice.
    Never below 1 / (draws + 1).
    """
    observed = float(np.mean([rows.mean() for rows in differences]))
    dice = np.random.default_rng(seed)
    total = np.zeros(draws)
    for rows in differences:
        moving = rows[rows != 0.0]
        # Most rows do not differ, and a coin for them changes nothing.
        signs = dice.integers(0, 2, size=(draws, moving.size), dtype=np.int8) * 2 - 1
        total += (signs @ moving) / rows.size / len(differences)
    extreme = int((np.abs(total) >= abs(observed) - 1e-12).sum())
    return (extreme + 1) / (draws + 1)


def bootstrap_interval(per_task: Sequence[Float64], seed: int = 0, draws: int = 2_000) -> tuple[float, float]:
    """The 95% percentile interval of the mean over tasks of the mean over rows, rows drawn anew within each task."""
    dice = np.random.default_rng(seed)
    means = np.zeros(draws)
    for rows in per_task:
        means += rows[dice.integers(0, rows.size, size=(draws, rows.size))].mean(axis=1) / len(per_task)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
