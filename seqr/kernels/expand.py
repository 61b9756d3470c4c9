"""What the chosen adapter adds: y[t] += z[t] B_i^T in place, per token for few tokens and per group for many."""

import math

import torch
import triton
import triton.language as tl

from seqr.kernels.candidates import Candidates, best_of
from seqr.kernels.group import DeviceGroups
from seqr.kernels.numbers import Pointer, exact_dot, rounded
from seqr.kernels.tables import SiteTables

# Columns that a step of ``expand_groups`` takes, and how many steps are under way at once.
GROUP_COLUMNS = 128
GROUP_STAGES = 3


def expand_tokens(
    y: torch.Tensor,
    z: torch.Tensor,
    tables: SiteTables,
    choice: Candidates,
    source: torch.Tensor | None = None,
    record: torch.Tensor | None = None,
) -> None:
    """y[t, o] = round(w[t, o] + sum over k of z[t, m, k] b_t[i(m, t), k, o]),  m = the module that o belongs to

    where w is ``source`` if given, else y itself: y [T, outputs] of any float dtype, in place; source fp32
    [T, >= outputs]; z fp32 [P, T, M r], its parts added in order; choice [M, T, S], the best of its S candidates. fp32
    sums, one rounding. In place, the row of a token with nobody is not touched. ``record`` int32 [M, T] gets i(m, t).
    For T up to some hundreds: every token reads its own adapter.
    """
    # Two columns at a time: with more, the ranks of one column would be spread over several warps, four times slower.
    base = y if source is None else source
    _expand_tokens_kernel[(y.shape[0], tables.blocks.shape[1])](
        y, base, z, tables.b_t, tables.blocks, tables.span, choice.value, choice.column,
        tables.span if record is None else record, y.shape[0], tables.blocks.shape[1], y.stride(0), base.stride(0),
        z.stride(0), z.stride(1), choice.stride, OUTPUTS=tables.b_t.shape[2], PARTS=z.shape[0], RANK=tables.rank,
        RANK_PADDED=triton.next_power_of_2(tables.rank), SPLITS=choice.splits,
        SPLITS_PADDED=triton.next_power_of_2(choice.splits), BLOCK=SiteTables.BLOCK, IN_PLACE=source is None,
        RECORD=record is not None, ALIGN=math.gcd(2, tables.align), num_warps=4,
    )  # fmt: skip


@triton.jit
def _expand_tokens_kernel(
    y: "Pointer", source: "Pointer", z: "Pointer", b_t: "Pointer", blocks: "Pointer", span: "Pointer",
    best_value: "Pointer", best_column: "Pointer", record: "Pointer", tokens: int, count: int, y_stride: int,
    source_stride: int, part_stride: int, token_stride: int, module_stride: int, OUTPUTS: tl.constexpr,
    PARTS: tl.constexpr, RANK: tl.constexpr, RANK_PADDED: tl.constexpr, SPLITS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr, BLOCK: tl.constexpr, IN_PLACE: tl.constexpr, RECORD: tl.constexpr,
    ALIGN: tl.constexpr,
) -> None:  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    module = tl.load(blocks + block)
    column = tl.multiple_of(tl.load(blocks + count + block), ALIGN) + tl.arange(0, BLOCK)
    inside = column < tl.multiple_of(tl.load(blocks + 2 * count + block), ALIGN)
    k = tl.arange(0, RANK_PADDED)
    own = k < RANK
    # What does not depend on the choice is asked for first.
    base = tl.load(source + token * source_stride + column, mask=inside, other=0.0).to(tl.float32)
    own_z = tl.zeros([RANK_PADDED], tl.float32)
    for part in tl.static_range(PARTS):
        own_z += tl.load(z + part * part_stride + token * token_stride + module * RANK + k, mask=own, other=0.0)
    one = tl.arange(0, 1)
    at = module.to(tl.int64) * module_stride + token * SPLITS + one
    adapter = tl.sum(best_of(best_value, best_column, at, one == 0, SPLITS, SPLITS_PADDED), 0)
    at_b = b_t + (adapter.to(tl.int64) * RANK + k)[:, None] * OUTPUTS + column[None, :]
    b = tl.load(at_b, mask=own[:, None] & inside[None, :] & (adapter >= 0), other=0.0).to(tl.float32)
    if RECORD:
        tl.store(record + module * tokens + token, adapter, mask=tl.load(span + module) == block)
    if IN_PLACE:
        inside = inside & (adapter >= 0)
    sum = base + tl.sum(own_z[:, None] * b, 0)
    # b is 0 where nobody was chosen, but z need not be finite there, and 0 times infinity is no 0.
    sum = tl.where(adapter >= 0, sum, base)
    tl.store(y + token * y_stride + column, rounded(sum, y.dtype.element_ty), mask=inside)


def expand_groups(y: torch.Tensor, z: torch.Tensor, tables: SiteTables, groups: DeviceGroups) -> None:
    """y[t, o] = round(y[t, o] + sum over k of z[t, m, k] b_t[i(m, t), k, o]) for every token in a group, in place.

    As ``expand_tokens``, z fp32 [1, T, M r], as one product per block of a group: z in three bf16 terms by bf16 b_t
    (the products are exact), or IEEE fp32 by fp32 b_t. Which blocks there are is read on the device.
    """
    _expand_groups_kernel[(groups.adapter.shape[1], tables.spans.shape[1])](
        y, z, tables.b_t, tables.spans, groups.token, groups.adapter, groups.used, y.shape[0], tables.spans.shape[1],
        groups.adapter.shape[1], y.stride(0), z.stride(1), OUTPUTS=tables.b_t.shape[2], RANK=tables.rank,
        RANK_PADDED=max(16, triton.next_power_of_2(tables.rank)), TILE=groups.tile, BLOCK=GROUP_COLUMNS,
        STAGES=GROUP_STAGES, ALIGN=tables.align, num_warps=4,
    )  # fmt: skip


@triton.jit
def _expand_groups_kernel(
    y: "Pointer", z: "Pointer", b_t: "Pointer", spans: "Pointer", sorted: "Pointer", block_adapter: "Pointer",
    used: "Pointer", tokens: int, count: int, group_blocks: int, y_stride: int, token_stride: int,
    OUTPUTS: tl.constexpr, RANK: tl.constexpr, RANK_PADDED: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, ALIGN: tl.constexpr,
) -> None:  # fmt: skip
    """One block of a group by one span of outputs: its tokens, z and adapter are looked up once for all columns."""
    span = tl.program_id(1)
    module = tl.load(spans + span)
    group = module * group_blocks + tl.program_id(0)
    here = tl.program_id(0) < tl.load(used + module)
    first = tl.multiple_of(tl.load(spans + count + span), ALIGN)
    # A block that no token is in has no columns to go through.
    end = tl.multiple_of(tl.where(here, tl.load(spans + 2 * count + span), first), ALIGN)
    token = tl.load(sorted + group * TILE + tl.arange(0, TILE))
    live = token < tokens
    k = tl.arange(0, RANK_PADDED)
    own = k < RANK
    rows_z = z + token.to(tl.int64)[:, None] * token_stride + (module * RANK + k)[None, :]
    own_z = tl.load(rows_z, mask=live[:, None] & own[None, :], other=0.0)
    rows_y = y + token.to(tl.int64)[:, None] * y_stride
    rows_b = b_t + (tl.load(block_adapter + group).to(tl.int64) * RANK + k)[:, None] * OUTPUTS
    for start in tl.range(first, end, BLOCK, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK)
        inside = column < end
        mask = live[:, None] & inside[None, :]
        base = tl.load(rows_y + column[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(rows_b + column[None, :], mask=own[:, None] & inside[None, :], other=0.0)
        sum = tl.zeros([TILE, BLOCK], tl.float32)
        if b_t.dtype.element_ty == tl.bfloat16:
            sum = exact_dot(own_z, b, sum)
        else:
            sum = tl.dot(own_z, b.to(tl.float32), sum, input_precision="ieee")
        tl.store(rows_y + column[None, :], rounded(base + sum, y.dtype.element_ty), mask=mask)
