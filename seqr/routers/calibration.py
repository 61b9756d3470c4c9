"""Calibration of a whole pool on public text, on the base model's hidden states (decision 7)."""

from collections.abc import Sequence
from typing import Any

import torch

from seqr.public_calibration import CalibrationTextMissing
from seqr.routers.interface import Activation, Batch
from seqr.routers.mixture_model import MixtureModel, hidden_states
from seqr.routers.norms import SquaredNorms
from seqr.routers.pool import AdapterPool
from seqr.routers.statistics import NormMoments, Statistics


def public_statistics(
    model: Any, pool: AdapterPool, sequences: Sequence[Sequence[int]], pad_token: int, batch_size: int = 16
) -> Statistics:
    """mu and sigma of every adapter over the tokens of ``sequences``, each one's first (an attention sink) left out.

    ``model`` is a causal language model without adapters. Raises ``CalibrationTextMissing`` where no sequence has a
    second token.
    """
    spoken = sorted((tokens for tokens in sequences if len(tokens) > 1), key=len)
    if not spoken:
        raise CalibrationTextMissing("public calibration needs at least one text of two tokens or more")
    moments = NormMoments(pool)
    squared = SquaredNorms(pool, torch.ones(len(pool.modules), len(pool), dtype=torch.float64))
    mixed = MixtureModel(model, pool)
    try:
        for start in range(0, len(spoken), batch_size):
            batch, ids = Batch.of(spoken[start : start + batch_size], len(pool), pad_token)

            def observe(activation: Activation, speaks: torch.Tensor = batch.speaks) -> None:
                moments.update(activation.module, squared(activation)[speaks].sqrt())

            with torch.inference_mode(), mixed.observed(observe):
                hidden_states(model, ids, batch)
    finally:
        mixed.close()
    return moments.statistics()
