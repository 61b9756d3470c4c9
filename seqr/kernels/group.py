"""Tokens grouped by the adapter they chose, on the device: nothing is read back, and every shape is known before."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from seqr.kernels.numbers import Pointer

GROUP_TILE = 16
_COUNT_TILE = 128
_SPAN = 64


@dataclass(frozen=True)
class DeviceGroups:
    """Per module, the tokens by adapter, each adapter's run filled up to whole blocks of ``tile`` rows.

    token int32 [M, L]: the token of each row, or T where a run is filled up and from the last run on; adapter int32
    [M, L / tile]: each block's; used int32 [M]: how many blocks there are. L = (ceil(T / tile) + min(N, T)) tile is
    enough for every choice there could be.
    """

    tile: int
    token: torch.Tensor
    adapter: torch.Tensor
    used: torch.Tensor


def group(choice: torch.Tensor, adapters: int, tile: int = GROUP_TILE) -> DeviceGroups:
    """choice int32 [M, T], each below ``adapters`` or -1 (in no group) -> the groups; tokens keep their order in one.

    A counting sort: how often each adapter was chosen per 128 tokens; where its tokens among them go; putting them
    there. Deterministic: no atomics.
    """
    modules, tokens = choice.shape
    device = choice.device
    blocks = triton.cdiv(tokens, tile) + min(adapters, tokens)
    chunks = triton.cdiv(tokens, _COUNT_TILE)
    out = DeviceGroups(
        tile,
        torch.empty(modules, blocks * tile, dtype=torch.int32, device=device),
        torch.empty(modules, blocks, dtype=torch.int32, device=device),
        torch.empty(modules, dtype=torch.int32, device=device),
    )
    counts = torch.empty(modules, chunks, adapters, dtype=torch.int32, device=device)
    # Where each adapter's rows begin: within its 64 adapters, and how many rows those have together.
    start = torch.empty(modules, adapters, dtype=torch.int32, device=device)
    spans = triton.cdiv(adapters, _SPAN)
    rows = torch.empty(modules, spans, dtype=torch.int32, device=device)
    rank = torch.empty(modules, tokens, dtype=torch.int32, device=device)
    share = triton.next_power_of_2(triton.cdiv(blocks * tile, chunks))
    _count_kernel[(chunks, modules)](
        choice, counts, rank, out.token, out.adapter, tokens, adapters, blocks, choice.stride(0),
        TILE=_COUNT_TILE, BLOCK=tile, SHARE=share, STEP=min(1024, share), num_warps=8,
    )  # fmt: skip
    _start_kernel[(spans, modules)](
        counts, start, rows, chunks, adapters, STEP=min(64, triton.next_power_of_2(chunks)), BLOCK=tile, SPAN=_SPAN
    )
    _place_kernel[(chunks, modules)](
        choice, counts, start, rows, rank, out.token, out.adapter, out.used, tokens, adapters, chunks, blocks, spans,
        choice.stride(0), TILE=_COUNT_TILE, BLOCK=tile, SPAN=_SPAN, STEP=min(64, triton.next_power_of_2(spans)),
    )  # fmt: skip
    return out


@triton.jit
def _count_kernel(
    choice: "Pointer", counts: "Pointer", rank: "Pointer", sorted: "Pointer", block_adapter: "Pointer", tokens: int,
    adapters: int, blocks: int, module_stride: int, TILE: tl.constexpr, BLOCK: tl.constexpr, SHARE: tl.constexpr,
    STEP: tl.constexpr,
) -> None:  # fmt: skip
    """Per chunk: counts[i] = how many of its tokens chose i; rank[t] = how many of them before t chose as t did.

    Also writes its share of the two tables' empty entries, which ``_place_kernel`` overwrites in part.
    """
    c = tl.program_id(0)
    module = tl.program_id(1)
    step = tl.arange(0, STEP)
    for start in range(0, SHARE, STEP):
        at = c * SHARE + start + step
        tl.store(sorted + module * blocks * BLOCK + at, tokens + step * 0, mask=at < blocks * BLOCK)
        tl.store(block_adapter + module * blocks + at, step * 0 - 1, mask=at < blocks)
    own = counts + (module * tl.num_programs(0) + c).to(tl.int64) * adapters
    for start in range(0, adapters, STEP):
        tl.store(own + start + step, step * 0, mask=start + step < adapters)
    tl.debug_barrier()
    i = tl.arange(0, TILE)
    token = c * TILE + i
    # Read twice, as rows and as columns of the table of equal choices; what lies beyond T equals nothing.
    mine = tl.load(choice + module * module_stride + token, mask=token < tokens, other=-1)
    same = (mine[:, None] == mine[None, :]) & (mine >= 0)[:, None]
    before = tl.sum((same & (i[None, :] < i[:, None])).to(tl.int32), 1)
    tl.store(rank + module * tokens + token, before, mask=token < tokens)
    tl.store(own + mine, tl.sum(same.to(tl.int32), 1), mask=(mine >= 0) & (before == 0))


@triton.jit
def _start_kernel(
    counts: "Pointer", start: "Pointer", rows: "Pointer", chunks: int, adapters: int, STEP: tl.constexpr,
    BLOCK: tl.constexpr, SPAN: tl.constexpr,
) -> None:  # fmt: skip
    """Of SPAN adapters: counts[c, i] becomes how many of the chunks before c chose i; start[i] = the rows before it."""
    span = tl.program_id(0)
    module = tl.program_id(1)
    i = span * SPAN + tl.arange(0, SPAN)
    total = tl.zeros([SPAN], tl.int32)
    for first in range(0, chunks, STEP):
        c = first + tl.arange(0, STEP)
        at = counts + (module * chunks + c).to(tl.int64)[:, None] * adapters + i[None, :]
        mask = (c < chunks)[:, None] & (i < adapters)[None, :]
        count = tl.load(at, mask=mask, other=0)
        tl.store(at, total[None, :] + tl.cumsum(count, 0) - count, mask=mask)
        total += tl.sum(count, 0)
    filled = (total + BLOCK - 1) // BLOCK * BLOCK
    tl.store(start + module * adapters + i, tl.cumsum(filled, 0) - filled, mask=i < adapters)
    tl.store(rows + module * tl.num_programs(0) + span, tl.sum(filled, 0))


@triton.jit
def _place_kernel(
    choice: "Pointer", counts: "Pointer", start: "Pointer", rows: "Pointer", rank: "Pointer", sorted: "Pointer",
    block_adapter: "Pointer", used: "Pointer", tokens: int, adapters: int, chunks: int, blocks: int, spans: int,
    module_stride: int, TILE: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr, STEP: tl.constexpr,
) -> None:  # fmt: skip
    """Each token into its row; the first token of a block names the block's adapter."""
    c = tl.program_id(0)
    module = tl.program_id(1)
    token = c * TILE + tl.arange(0, TILE)
    mine = tl.load(choice + module * module_stride + token, mask=token < tokens, other=-1)
    grouped = mine >= 0
    row = tl.load(start + module * adapters + mine, mask=grouped, other=0)
    row += tl.load(counts + (module * chunks + c).to(tl.int64) * adapters + mine, mask=grouped, other=0)
    row += tl.load(rank + module * tokens + token, mask=grouped, other=0)
    total = 0
    for first in range(0, spans, STEP):
        span = first + tl.arange(0, STEP)
        held = tl.load(rows + module * spans + span, mask=span < spans, other=0)
        row += tl.sum(tl.where(span[None, :] < (mine // SPAN)[:, None], held[None, :], 0), 1)
        total += tl.sum(held, 0)
    if c == 0:
        tl.store(used + module, total // BLOCK)
    tl.store(sorted + module * blocks * BLOCK + row, token, mask=grouped)
    tl.store(block_adapter + module * blocks + row // BLOCK, mine, mask=grouped & (row % BLOCK == 0))
