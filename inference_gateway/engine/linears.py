"""Linears that take the place of a model's own, over the same weights, and multiply in another way."""

import torch
import torch.nn.functional as F
from torch import nn

from seqr.routing.products import ROW_TILE

FEW_ROWS = 64


class StandIn(nn.Linear):
    """y = x W^T + b with the weight and bias of the Linear that it takes the place of."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)


class TiledLinear(StandIn):
    """16 rows at a time, filled up with zeros: a row's bits do not depend on the others (``engine.invariant``)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., n] -> [..., m]."""
        flat = x.reshape(-1, x.shape[-1])
        rows = flat.shape[0]
        padded = F.pad(flat, (0, 0, 0, -rows % ROW_TILE))
        tiles = [F.linear(tile, self.weight, self.bias) for tile in torch.split(padded, ROW_TILE)]
        return torch.cat(tiles)[:rows].view(*x.shape[:-1], self.out_features)


class FewRowsLinear(StandIn):
    """y^T = W x^T where x has few rows, as in a decode step: the faster way round on CPUs (decision 17)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., n] -> [..., m], contiguous."""
        flat = x.reshape(-1, x.shape[-1])
        if not 1 < flat.shape[0] <= FEW_ROWS:
            return super().forward(x)
        y = torch.mm(self.weight, flat.T).T.contiguous()
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], self.out_features)


def replace_linears(model: nn.Module, kind: type[StandIn]) -> None:
    """Put a ``kind`` in the place of every Linear of ``model``."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, kind(child))
