"""The routed Linears of one site on a GPU: ``seqr.routed_linear.RoutedLinear`` for modules that read the same x."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from seqr.kernels.expand import expand_groups, expand_tokens
from seqr.kernels.group import group
from seqr.kernels.numbers import INTERPRETED
from seqr.kernels.project import Projection, add_parts, project
from seqr.kernels.stacked import stack_weight, stacked_product
from seqr.kernels.step import DeviceStep, DeviceStepMismatch, current_step
from seqr.kernels.tables import SiteMismatch

# Up to here every token reads its own adapter's b_t; beyond, tokens are grouped by adapter.
GATHER_TOKENS = 256


class RoutedSite(nn.Module):
    """y[t, m] = W_m x[t] + b_i z[t, m] with z[t, m] = A_m x[t] and i the step's choice for (t, m); W_m x where nobody.

    The same meaning as ``RoutedLinear``, with these differences, each of rounding: z and the scores are added up in
    another order (``project``, ``score_tile``: the bounds hold), so that a choice differs only where two values are
    within them; b_t may be bf16; with ``stacked``, W x is not rounded to the model's dtype before the share is added.
    Where a choice must be exact although fp32 cannot tell, the kernels must also return the runner-up and mark tokens
    whose margin is inside ``reference_score_error``; one more kernel decides those in fp64. That is not built.

    ``overlap``: scores on a stream of their own while W x is computed, so that decode waits for the expand only.
    """

    def __init__(
        self,
        linears: Sequence[nn.Linear],
        a: Sequence[torch.Tensor],
        site: int,
        first_module: int,
        stacked: bool = False,
        overlap: bool = False,
    ):
        """``linears`` become views of one weight; ``a``: A [r, n] of each; ``site``, ``first_module``: in the step."""
        super().__init__()
        weights, device = [linear.weight.detach() for linear in linears], linears[0].weight.device
        if device.type != "cuda" and not INTERPRETED.value:
            raise SiteMismatch(f"these kernels run on a GPU, and the weights are on {device}: use seqr.routed_linear")
        if len({w.shape[1] for w in weights}) != 1 or len(a) != len(linears) or len({p.shape for p in a}) != 1:
            raise SiteMismatch("the modules of a site must read the same x and have an A of the same shape each")
        if stacked and weights[0].dtype != torch.bfloat16:
            raise SiteMismatch(f"A can be stacked under bf16 weights, got {weights[0].dtype}")
        self.outputs = tuple(w.shape[0] for w in weights)
        self.site, self.first_module, self.stacked = site, first_module, stacked
        together = torch.cat([part.detach().to(device, torch.float32) for part in a])
        self.a = Projection.of(together)
        self.weight = nn.Parameter(
            stack_weight(torch.cat(weights), together) if stacked else torch.cat(weights), requires_grad=False
        )
        start = 0
        for linear in linears:
            linear.weight = nn.Parameter(self.weight[start : start + linear.weight.shape[0]], requires_grad=False)
            start += linear.weight.shape[0]
        biases = [
            linear.bias.detach() if linear.bias is not None else weights[0].new_zeros(linear.out_features)
            for linear in linears
        ]
        self.bias = torch.cat(biases) if any(linear.bias is not None for linear in linears) else None
        self.pending: tuple[torch.Tensor, torch.Tensor] | None = None
        self._side: torch.cuda.Stream | None = None
        if overlap and device.type == "cuda":
            # Before W x: its few small programs would else wait until all of W x has begun.
            self._side = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., n] -> [..., outputs of all modules side by side]."""
        step = current_step()
        flat = x.reshape(-1, x.shape[-1])
        if flat.shape[0] != step.tokens:
            raise DeviceStepMismatch(f"the step describes {step.tokens} tokens, but the site was given {flat.shape[0]}")
        if step.idle:
            y = F.linear(flat, self.weight[: sum(self.outputs)], self.bias)
        else:
            y = self._stacked(flat, step) if self.stacked else self._separate(flat, step)
        return y.view(*x.shape[:-1], -1)

    def parts(self) -> list["SitePart"]:
        """A stand-in for each of the Linears, to be called in their order with the same x."""
        return [SitePart(self, index) for index in range(len(self.outputs))]

    def _separate(self, x: torch.Tensor, step: DeviceStep) -> torch.Tensor:
        if self._side is None:
            z = project(x, self.a)
            found, z = step.choose(self.site, self.first_module, z)
            y = F.linear(x, self.weight, self.bias)
        else:
            here = torch.cuda.current_stream(x.device)
            self._side.wait_stream(here)
            with torch.cuda.stream(self._side):
                found, z = step.choose(self.site, self.first_module, project(x, self.a))
            y = F.linear(x, self.weight, self.bias)
            here.wait_stream(self._side)
        tables = step.tables[self.site]
        record = step.chosen[self.first_module : self.first_module + tables.modules]
        if step.nobody:
            return y
        if x.shape[0] <= GATHER_TOKENS:
            expand_tokens(y, z, tables, found, record=record)
        else:
            expand_groups(y, add_parts(z), tables, group(found.choice(record), tables.adapters))
        return y

    def _stacked(self, x: torch.Tensor, step: DeviceStep) -> torch.Tensor:
        tables = step.tables[self.site]
        product, z = stacked_product(x, self.weight, self.a.columns)
        if self.bias is not None:
            product = product + self.bias
        found, z = step.choose(self.site, self.first_module, z)
        record = step.chosen[self.first_module : self.first_module + tables.modules]
        y = x.new_empty(x.shape[0], product.shape[1])
        if step.nobody:
            y.copy_(product)
        elif x.shape[0] <= GATHER_TOKENS:
            expand_tokens(y, z, tables, found, source=product, record=record)
        else:
            y.copy_(product)
            expand_groups(y, add_parts(z), tables, group(found.choice(record), tables.adapters))
        return y


class SitePart(nn.Module):
    """One of a site's Linears for code that calls them one by one: the first call computes all of them."""

    def __init__(self, site: RoutedSite, index: int):
        super().__init__()
        # In a list, so that the site's weight is not registered once per part.
        self._site = [site]
        self._index = index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., n] -> [..., m]; raises ``SiteMismatch`` when a later part is given another x than the first."""
        site = self._site[0]
        if self._index == 0:
            site.pending = (x, site(x))
        pending = site.pending
        if pending is None or pending[0] is not x:
            raise SiteMismatch("the modules of a site must be called in their order, all with the same x")
        start = sum(site.outputs[: self._index])
        part = pending[1][..., start : start + site.outputs[self._index]]
        if self._index == len(site.outputs) - 1:
            site.pending = None
        return part
