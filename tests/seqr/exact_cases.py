"""The fp64 oracle over a shelf of adapters in Python's own numbers, one token and one adapter at a time."""

import math

import torch

from seqr.bench.routing.adapters import Shelf
from seqr.routing.reference import oracle_score, reference_choice


def plain_oracle(shelf: Shelf, z: torch.Tensor, permitted: torch.Tensor) -> list[int]:
    """argmax over the permitted of the fp64 score, token by token."""
    choices = []
    parts = list(zip(shelf.r.tolist(), shelf.mu.tolist(), shelf.sigma.tolist(), strict=True))
    for token, allowed in zip(z.tolist(), permitted.tolist(), strict=True):
        values = [oracle_score(r, mu, sigma, token) if sigma > 0.0 else math.nan for r, mu, sigma in parts]
        choices.append(reference_choice(values, allowed[: len(values)]))
    return choices
