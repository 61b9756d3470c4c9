"""BASE: no adapter at all, the lower end of every comparison."""

import torch

from seqr.routers.interface import Activation, Mixture, Router


class BaseRouter(Router):
    """y = W x."""

    name = "base"

    def mixture(self, activation: Activation) -> Mixture:
        return Mixture.of_one(torch.full((activation.x.shape[0],), -1))
