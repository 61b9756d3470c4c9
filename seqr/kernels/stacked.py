"""A stacked under W: one product gives y = W x and z = A x.

What z needs decides the form. Decisions are defined on z = A x with A in fp32 and x the model's bf16 numbers, added up
in fp32. A bf16 A is 2^-9 off and a bf16 z is again: either changes the choice of up to some percent of tokens. So A is
stacked as three bf16 terms, whose products with x are exact, and the product's output stays fp32 for y's columns, too:

    out = x [W; A_3; A_2; A_1]^T  fp32 [T, m + 3 C];   y = round(out[:, :m] + adapter's share);   z = out's three C's

Costs 3 C more rows than m (q, k, v of an 8B model at r = 16: 2.3% more weight bytes) and 4 instead of 2 bytes per y,
and saves the launch that ``project`` needs. W x is then rounded once, after the adapter's share, instead of twice.
"""

import torch

from seqr.kernels.project import TERMS, split_bf16


def stack_weight(weight: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """[W; A_3; A_2; A_1], A's smallest term first: weight bf16 [m, n], a fp32 [C, n] -> bf16 [m + 3 C, n]."""
    return torch.cat([weight, split_bf16(a).flip(0).flatten(0, 1).to(weight.device)])


def stacked_product(x: torch.Tensor, stacked: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x bf16 [T, n] by ``stack_weight``'s result -> W x fp32 [T, m] and z fp32 [3, T, C], parts to add in order.

    Both are views of one product.
    """
    if x.device.type == "cuda":
        out = torch.mm(x, stacked.T, out_dtype=torch.float32)
    else:
        out = torch.mm(x.to(torch.float32), stacked.T.to(torch.float32))
    outputs = stacked.shape[0] - TERMS * columns
    return out[:, :outputs], out[:, outputs:].view(-1, TERMS, columns).transpose(0, 1)
