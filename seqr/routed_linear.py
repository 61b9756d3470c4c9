"""A Linear that adds, to every token, the one permitted adapter that the step's router chooses."""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from seqr.errors import SeqrError
from seqr.plan import Plan
from seqr.routing.groups import Groups
from seqr.routing.optional import compiled
from seqr.routing.products import ROW_TILE, ExactFp32, project, row_product
from seqr.step import BaseOnly, StepContext, StepMismatch, base_only, get_context


class ModelMismatch(SeqrError):
    """A base model without a Linear that the plan names, or with one of another shape."""

    code = "model_mismatch"


class RoutedLinear(nn.Module):
    """y = W x + Q_i R_i z with z = A x and i the router's choice for the token; y = W x where it chooses nobody.

    Reads the current ``StepContext``; without one it raises ``StepMissing``, and with one for another number of tokens
    ``StepMismatch``: it never guesses who is asking. z and the scores are fp32 whatever the model's dtype; the
    adapter's share is computed in fp32 and added to y in fp32 (y widened if need be), then rounded once to y's dtype,
    as peft does in training. Rows with nobody are not touched: they are W x bit for bit.
    """

    def __init__(self, base: nn.Linear, a: torch.Tensor, index: int):
        """``a`` [r, n]: the shared A of this module; ``index``: the module's place in the plan."""
        super().__init__()
        self.base = base
        self.index = index
        self.site = Site([a.detach().to(base.weight.device)], index)

    @property
    def a(self) -> torch.Tensor:
        """The module's A, fp32 [r, n]."""
        rank = self.site.a_t.shape[1] // self.site.count
        start = rank * (self.index - self.site.first)
        return self.site.a_t.T[start : start + rank]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., n] -> [..., m]; all leading dimensions together are the step's T tokens."""
        step = get_context()
        y = cast(torch.Tensor, self.base(x))
        if isinstance(step, BaseOnly):
            return y
        tokens = y.numel() // y.shape[-1]
        if tokens != step.tokens:
            raise StepMismatch(f"the step describes {step.tokens} tokens, but the layer was given {tokens}")
        if step.idle:
            return y
        with ExactFp32(x.device.type):
            z, column = self.site.route(x, step, self.index)
            stack = step.library.stacks[self.index]
            if step.adds_nothing:
                return y
            if compiled is not None and x.device.type == "cpu":
                add_rows(y.view(tokens, -1), z, stack.addresses, column)
            else:
                add_adapters(y.view(tokens, -1), z, stack.b_t, step.grouped(column))
        return y


class Site(nn.Module):
    """Adapted modules that follow each other and read one x, as q, k and v do: the first one called routes for all.

    One product for all their z and one call for all their choices: in a decode step each of these is so small that
    calling it is most of its cost.
    """

    a_t: torch.Tensor

    def __init__(self, a: Sequence[torch.Tensor], first: int):
        """``a``: the A [r, n] of each module; ``first``: the first module's place in the plan."""
        super().__init__()
        self.first, self.count = first, len(a)
        together = torch.cat([part.to(torch.float32) for part in a])
        self.register_buffer("a_t", together.T, persistent=False)
        self._routed: _Routed | None = None

    def route(self, x: torch.Tensor, step: StepContext, module: int) -> tuple[torch.Tensor, torch.Tensor]:
        """z fp32 [T, r] and the step's choices int64 [T] at ``module``, a place in the plan: x [..., n]."""
        place = module - self.first
        routed = self._routed
        if place == 0 or routed is None or routed.x is not x or routed.step() is not step:
            z = self._project(x)
            if place:  # on its own: something else called it than the model that the site was found in
                return z[place], step.choose(module, z[place])
            routed = self._routed = _Routed(x, weakref.ref(step), z, step.choose_together(module, z))
        if place == self.count - 1:
            self._routed = None
        return routed.z[place], routed.columns[place]

    def _project(self, x: torch.Tensor) -> torch.Tensor:
        """fp32 [K, T, r]."""
        flat = x.reshape(-1, x.shape[-1])
        z = project(flat, self.a_t)[: flat.shape[0]]
        return z.view(flat.shape[0], self.count, -1).transpose(0, 1).contiguous()


@dataclass(frozen=True)
class _Routed:
    """What a site's first module has found for all of them, for the x and the step that it was given.

    The step is not kept alive, nor its library with it, should the rest of the site never be called.
    """

    x: torch.Tensor
    step: weakref.ref[StepContext]
    z: torch.Tensor
    columns: Sequence[torch.Tensor]


def add_adapters(y: torch.Tensor, z: torch.Tensor, b_t: Sequence[torch.Tensor], groups: Groups) -> None:
    """y[t] += z[t] B_i^T in place, for every token t and the adapter i that it is grouped under.

    y [T, m] of any float dtype, z [T, r] fp32, b_t: N tensors [r, m] fp32. One product per adapter in use; on a CPU a
    token's result does not depend on the size of its group, nor on which other groups there are.
    """
    if not groups.runs:
        return
    if groups.everything:
        missing = -z.shape[0] % ROW_TILE
        share = row_product(F.pad(z, (0, 0, 0, missing)) if missing else z, b_t[groups.runs[0][0]])[: z.shape[0]]
        if y.dtype == share.dtype:
            y.add_(share)
        else:
            y.copy_(y + share)
        return
    sorted_z = z.index_select(0, groups.rows)
    runs = [row_product(sorted_z[start:end], b_t[column]) for column, start, end in groups.runs]
    share = torch.cat(runs).index_select(0, groups.kept)
    if y.dtype == share.dtype:
        y.index_add_(0, groups.tokens, share)
    else:
        y.index_copy_(0, groups.tokens, (y.index_select(0, groups.tokens) + share).to(y.dtype))


def add_rows(y: torch.Tensor, z: torch.Tensor, addresses: npt.NDArray[np.int64], column: torch.Tensor) -> None:
    """As ``add_adapters``, on a CPU with Numba, token by token; addresses int64 [N] of the tensors b_t, column [T]."""
    wide = y.to(torch.float32)  # y itself where it is fp32
    compiled.add_rows(wide.numpy(), z.numpy(), addresses, column.numpy())
    if wide is not y:
        y.copy_(wide)


def adapt_model(model: nn.Module, plan: Plan, a: Mapping[str, torch.Tensor]) -> dict[str, RoutedLinear]:
    """Replace the plan's Linears in ``model`` by routed ones; returns them by name, in the plan's order.

    ``a``: the shared A per module (``seqr.shared_a.verify_a``). Turns gradients off for the whole model: this is the
    serving side. Raises ``ModelMismatch`` before anything is replaced.
    """
    linears = {}
    for spec in plan.modules:
        linears[spec.name] = find_linear(model, spec.name, spec.in_features, spec.out_features, f"plan {plan.plan_id}")
    model.requires_grad_(False)
    routed = {}
    for index, (name, linear) in enumerate(linears.items()):
        parent, _, child = name.rpartition(".")
        routed[name] = RoutedLinear(linear, a[name], index)
        setattr(model.get_submodule(parent), child, routed[name])
    return routed


def join_sites(model: nn.Module, plan: Plan) -> None:
    """Let the modules of an adapted ``model`` that read the same x be routed together. Runs the base model once.

    Raises ``ModelMismatch`` for a model that is not adapted.
    """
    for first, count in find_sites(model, plan):
        parts = [adapted(model, spec.name) for spec in plan.modules[first : first + count]]
        site = Site([part.a for part in parts], first)
        for part in parts:
            part.site = site


def adapted(model: nn.Module, name: str) -> RoutedLinear:
    """The module that ``adapt_model`` has put there; raises ``ModelMismatch`` for another one."""
    module = model.get_submodule(name)
    if not isinstance(module, RoutedLinear):
        raise ModelMismatch(f"module {name} must be adapted first, got {type(module).__name__}")
    return module


def find_sites(model: nn.Module, plan: Plan) -> tuple[tuple[int, int], ...]:
    """The plan's modules that follow each other and read the same tensor, each run of them as (first, how many).

    Sees it in a forward pass of the adapted ``model``, a causal language model, over one token.
    """
    calls: list[tuple[int, torch.Tensor]] = []

    def hook_for(index: int) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            calls.append((index, inputs[0]))

        return model.get_submodule(plan.modules[index].name).register_forward_pre_hook(hook)

    handles = [hook_for(index) for index in range(len(plan.modules))]
    try:
        with torch.inference_mode(), base_only():
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    called = [index for index, _ in calls]
    together = {
        index
        for (before, read), (index, x) in pairwise(calls)
        if index == before + 1 and read is x and called.count(index) == called.count(before) == 1
    }
    sites: list[tuple[int, int]] = []
    for index in range(len(plan.modules)):
        if index in together:
            sites[-1] = sites[-1][0], sites[-1][1] + 1
        else:
            sites.append((index, 1))
    return tuple(sites)


def find_linear(model: nn.Module, name: str, in_features: int, out_features: int, whose: str) -> nn.Linear:
    """The Linear called ``name``, of that shape; ``whose`` wish it is goes into ``ModelMismatch``."""
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        raise ModelMismatch(f"the base model has no module {name}, which {whose} names") from None
    if not isinstance(linear, nn.Linear):
        raise ModelMismatch(f"module {name} must be a Linear, got {type(linear).__name__}")
    if (linear.in_features, linear.out_features) != (in_features, out_features):
        raise ModelMismatch(
            f"module {name} is {linear.in_features} to {linear.out_features} in the base model, and "
            f"{in_features} to {out_features} in {whose}"
        )
    return linear
