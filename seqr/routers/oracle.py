"""ORACLE: somebody says which adapter each sequence belongs to (SEQR paper, appendix G)."""

from collections.abc import Callable

import torch

from seqr.routers.interface import Activation, Batch, Mixture, Router
from seqr.routers.pool import AdapterPool


class OracleRouter(Router):
    """One adapter per sequence, told from outside; a sequence whose adapter is not permitted gets none."""

    name = "oracle"

    def __init__(self, pool: AdapterPool, owners: Callable[[Batch], torch.Tensor]):
        """owners: a batch -> the column of each sequence, int64 [S]."""
        super().__init__(pool)
        self._owners = owners

    def begin(self, batch: Batch) -> None:
        super().begin(batch)
        column = self._owners(batch)[batch.sequence]
        allowed = batch.allowed.gather(1, column[:, None])[:, 0]
        self._column = column.masked_fill(~allowed, -1)

    def mixture(self, activation: Activation) -> Mixture:
        return Mixture.of_one(self._column)
