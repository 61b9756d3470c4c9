"""Accumulated evidence for many tokens per sequence: a prefix sum over tokens, in chunks, in three kernels.

1. ``evidence_units``: every chunk's scores, as whole units [T, N], and their sum per chunk.
2. ``_carry``: per sequence, what its chunks before each one add up to, from the sum it came with.
3. ``_choose``: per chunk, the prefix sums from 1 and 2, the value carried from the sites before, and its argmax.

T x N units of 4 bytes are written and read once, so that the scores need not be computed twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from seqr.kernels.candidates import Candidates
from seqr.kernels.evidence_units import evidence_units, unit_and_usable
from seqr.kernels.numbers import ADAPTER_BLOCK, Pointer
from seqr.kernels.permission_bits import permitted_tile
from seqr.kernels.score_tile import best_in_tile
from seqr.kernels.tables import SiteTables

CHUNK = 64


@dataclass(frozen=True)
class Chunks:
    """S runs of consecutive tokens, one sequence each, cut into C chunks of at most 64 tokens, none across two runs.

    chunk int32 [2, C]: first token and length; run int32 [3, S]: slot, first chunk and end of its chunks.
    """

    chunk: torch.Tensor
    run: torch.Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], slots: Sequence[int], device: torch.device, size: int = CHUNK) -> "Chunks":
        """One run per length, in order; ``slots``: where each one's sums live."""
        chunks: list[tuple[int, int]] = []
        runs: list[tuple[int, int, int]] = []
        start = 0
        for length, slot in zip(lengths, slots, strict=True):
            first = len(chunks)
            chunks += [(at, min(size, start + length - at)) for at in range(start, start + length, size)]
            runs.append((slot, first, len(chunks)))
            start += length
        chunk, run = (torch.tensor(rows, dtype=torch.int32).T.contiguous().to(device) for rows in (chunks, runs))
        return cls(chunk, run)


def route_evidence_runs(
    z: torch.Tensor,
    tables: SiteTables,
    bits: torch.Tensor,
    row: torch.Tensor,
    chunks: Chunks,
    counts: torch.Tensor,
    sums: torch.Tensor,
    value: torch.Tensor,
    first: bool,
    size: int = CHUNK,
) -> Candidates:
    """As ``route_evidence``, for runs of tokens; the runs share no slot but the spare one, where no token counts:

        prefix[m, t, n] = sums[m, slot, n] + sum of u[m, t', n] over t' <= t in t's run
        value[t, n] += prefix[m, t, n];   choice[m, t] = argmax of value[t, :]
        sums[m, slot, n] = the last prefix of the run

    z fp32 [1, T, M r] -> Candidates [M, T, N / 64] fp64. Any cutting of a sequence into runs gives the same bits.
    """
    if z.shape[0] != 1:
        raise ValueError(f"z must have its parts added, got {z.shape[0]} of them")
    tokens, blocks, modules = z.shape[1], tables.adapters // ADAPTER_BLOCK.value, tables.modules
    count, width, device = chunks.chunk.shape[1], tables.adapters, z.device
    units, totals, _ = evidence_units(z, tables, counts, chunks.chunk, size)
    before = torch.empty(modules, count, width, dtype=torch.float64, device=device)
    found = Candidates.empty(modules, tokens, blocks, torch.float64, device)
    warps = 8 if size >= 64 else 4
    _carry_kernel[(chunks.run.shape[1], blocks, modules)](
        totals, chunks.run, sums, before, chunks.run.shape[1], count, blocks, sums.stride(0), STEP=16, num_warps=4
    )
    _choose_kernel[(count, blocks)](
        units, before, chunks.chunk, bits, row, value, found.value, found.column, tokens, count, blocks,
        bits.shape[0], MODULES=modules, TILE=size, FIRST=first, num_warps=warps,
    )  # fmt: skip
    return found


@triton.jit
def _carry_kernel(
    totals: "Pointer", run: "Pointer", sums: "Pointer", before: "Pointer", runs: int, chunks: int, blocks: int,
    sums_stride: int, STEP: tl.constexpr,
) -> None:  # fmt: skip
    """before[m, c, n] = the run's sum when its chunk c begins; sums[m, slot, n] = its sum at the end. One run."""
    s = tl.program_id(0)
    module = tl.program_id(2)
    width = blocks * ADAPTER_BLOCK
    column = tl.program_id(1) * ADAPTER_BLOCK + tl.arange(0, ADAPTER_BLOCK)
    own = sums + module.to(tl.int64) * sums_stride + tl.load(run + s).to(tl.int64) * width + column
    carried = tl.load(own)
    end = tl.load(run + 2 * runs + s)
    for start in range(tl.load(run + runs + s), end, STEP):
        c = start + tl.arange(0, STEP)
        inside = (c < end)[:, None]
        at = (module * chunks + c).to(tl.int64)[:, None] * width + column[None, :]
        total = tl.load(totals + at, mask=inside, other=0).to(tl.float64)
        tl.store(before + at, carried[None, :] + tl.cumsum(total, 0) - total, mask=inside)
        carried += tl.sum(total, 0)
    tl.store(own, carried)


@triton.jit
def _choose_kernel(
    units: "Pointer", before: "Pointer", chunk: "Pointer", bits: "Pointer", row: "Pointer", value: "Pointer",
    best_value: "Pointer", best_column: "Pointer", tokens: int, chunks: int, blocks: int, rows: int,
    MODULES: tl.constexpr, TILE: tl.constexpr, FIRST: tl.constexpr,
) -> None:  # fmt: skip
    """One chunk and one block of adapters, through all modules: value stays in registers between them."""
    c = tl.program_id(0)
    block = tl.program_id(1)
    step = tl.arange(0, TILE)
    token = tl.load(chunk + c) + step
    live = step < tl.load(chunk + chunks + c)
    width = blocks * ADAPTER_BLOCK
    column = block * ADAPTER_BLOCK + tl.arange(0, ADAPTER_BLOCK)
    own_row = tl.load(row + token, mask=live, other=0)
    permitted = permitted_tile(bits, rows, width // 32, own_row, column)
    own_value = value + token.to(tl.int64)[:, None] * width + column[None, :]
    if FIRST:
        total = tl.zeros([TILE, ADAPTER_BLOCK], tl.float64)
    else:
        total = tl.load(own_value, mask=live[:, None], other=0.0)
    for module in tl.static_range(MODULES):
        at = (module * tokens + token).to(tl.int64)[:, None] * width + column[None, :]
        unit, usable = unit_and_usable(tl.load(units + at, mask=live[:, None], other=0))
        carried = tl.load(before + (module * chunks + c).to(tl.int64) * width + column)
        total += carried[None, :] + tl.cumsum(unit, 0).to(tl.float64)
        top, lowest = best_in_tile(total, permitted & usable)
        to = (module * tokens + token).to(tl.int64) * blocks + block
        tl.store(best_value + to, top, mask=live)
        tl.store(best_column + to, tl.where(top > float("-inf"), block * ADAPTER_BLOCK + lowest, -1), mask=live)
    tl.store(own_value, total, mask=live[:, None])
