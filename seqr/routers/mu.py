"""MU: the average of all adapters, no routing (Ostapenko et al. 2024; SEQR paper, section 4.5)."""

import torch

from seqr.routers.interface import Activation, Mixture, Router


class MuRouter(Router):
    """y = W x + the mean of B_i A_i x over the permitted adapters."""

    name = "mu"

    def mixture(self, activation: Activation) -> Mixture:
        allowed = self.batch.allowed
        count = allowed.sum(1, keepdim=True).clamp_min(1)
        columns = torch.arange(allowed.shape[1]).expand_as(allowed).masked_fill(~allowed, -1)
        return Mixture(columns, allowed.to(torch.float32) / count)
