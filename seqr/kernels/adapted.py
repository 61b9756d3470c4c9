"""A model that ``seqr.routed_linear.adapt_model`` has adapted, made to run on these kernels where a step says so."""

from dataclasses import dataclass

import torch
from torch import nn

from seqr.kernels.routed_site import RoutedSite, SitePart
from seqr.kernels.step import has_step
from seqr.kernels.tables import SiteTables
from seqr.library import Library
from seqr.plan import Plan
from seqr.routed_linear import RoutedLinear, adapted, find_sites


class SwitchedLinear(nn.Module):
    """A part of a site in a step of ``seqr.kernels.step``, and the ``RoutedLinear`` it replaces in any other."""

    def __init__(self, plain: RoutedLinear, part: SitePart):
        super().__init__()
        self.plain = plain
        self.part = part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., n] -> [..., m]."""
        y: torch.Tensor = self.part(x) if has_step() else self.plain(x)
        return y


@dataclass(frozen=True)
class AdaptedSites:
    """The sites of a model, each as (its first module, how many); dtype: b_t's, bf16 for a bf16 model, else fp32."""

    plan: Plan
    sites: tuple[tuple[int, int], ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, model: nn.Module, plan: Plan) -> "AdaptedSites":
        """Make sites of the plan's modules in ``model``: of those that follow each other and read the same tensor.

        Runs the base model once, over one token, to see what they read. Raises ``SiteMismatch`` off a GPU.
        """
        names = [spec.name for spec in plan.modules]
        sites = find_sites(model, plan)
        for site, (first, count) in enumerate(sites):
            linears = [adapted(model, name) for name in names[first : first + count]]
            together = RoutedSite([one.base for one in linears], [one.a for one in linears], site, first)
            for name, linear, part in zip(names[first : first + count], linears, together.parts(), strict=True):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, SwitchedLinear(linear, part))
        dtype = next(model.parameters()).dtype
        return cls(plan, sites, dtype if dtype == torch.bfloat16 else torch.float32)

    def tables(self, library: Library) -> tuple[SiteTables, ...]:
        """What the sites read of ``library``."""
        made = []
        for first, count in self.sites:
            outputs = [spec.out_features for spec in self.plan.modules[first : first + count]]
            made.append(SiteTables.of_stacks(library.stacks[first : first + count], outputs, self.dtype))
        return tuple(made)
