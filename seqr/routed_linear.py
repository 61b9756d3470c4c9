"""A Linear that adds, to every token, the one permitted adapter that the step's router chooses."""

from collections.abc import Mapping, Sequence
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
from seqr.step import BaseOnly, StepMismatch, get_context


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

    a_t: torch.Tensor

    def __init__(self, base: nn.Linear, a: torch.Tensor, index: int):
        """``a`` [r, n]: the shared A of this module; ``index``: the module's place in the plan."""
        super().__init__()
        self.base = base
        self.index = index
        self.register_buffer("a_t", a.detach().to(base.weight.device, torch.float32).contiguous().T, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., n] -> [..., m]; all leading dimensions together are the step's T tokens."""
        step = get_context()
        y = cast(torch.Tensor, self.base(x))
        if isinstance(step, BaseOnly):
            return y
        flat = x.reshape(-1, x.shape[-1])
        tokens = flat.shape[0]
        if tokens != step.tokens:
            raise StepMismatch(f"the step describes {step.tokens} tokens, but the layer was given {tokens}")
        if step.idle:
            return y
        with ExactFp32(x.device.type):
            z = project(flat, self.a_t)[:tokens]
            column, stack = step.choose(self.index, z), step.library.stacks[self.index]
            if step.adds_nothing:
                return y
            if compiled is not None and x.device.type == "cpu":
                add_rows(y.view(tokens, -1), z, stack.addresses, column)
            else:
                add_adapters(y.view(tokens, -1), z, stack.b_t, step.grouped(column))
        return y


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
