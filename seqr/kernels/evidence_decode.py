"""Accumulated evidence for one token per sequence: score, sums, value and argmax in one kernel for all of a site."""

import torch
import triton
import triton.language as tl

from seqr.kernels.candidates import Candidates
from seqr.kernels.numbers import ADAPTER_BLOCK, Pointer
from seqr.kernels.permission_bits import permitted_tile
from seqr.kernels.route import summed, token_tile
from seqr.kernels.score_tile import best_in_tile, score_tile, sum_parts, units_tile, usable_tile
from seqr.kernels.tables import SiteTables


def route_evidence(
    z: torch.Tensor,
    tables: SiteTables,
    bits: torch.Tensor,
    row: torch.Tensor,
    slot: torch.Tensor,
    counts: torch.Tensor,
    sums: torch.Tensor,
    value: torch.Tensor,
    first: bool,
) -> tuple[Candidates, torch.Tensor]:
    """For each of the site's modules m in order, with u the clipped score in units of 2^-20 (0 where not counts[t]):

        sums[m, slot[t], n] += u[t, n];   value[t, n] += sums[m, slot[t], n];   choice[m, t] = argmax of value[t, :]

    z, bits, row and the result as in ``route_tokens``, with fp64 values; slot int32 [T], each one once but for the
    spare slot of padding; counts int8 [T]; sums fp64 [M, slots + 1, N]: the site's modules of ``EvidenceState.sums``,
    updated in place; value fp64 [T, N]: carried from site to site, begun at 0 when ``first``. All of it whole numbers
    below 2^53, so exact: the bits are those of ``seqr.routing.evidence``, given the scores.
    """
    tokens, tile, blocks = z.shape[1], token_tile(z.shape[1]), tables.adapters // ADAPTER_BLOCK.value
    z_sum = summed(z, blocks)
    found = Candidates.empty(tables.modules, tokens, blocks, torch.float64, z.device)
    _evidence_kernel[(triton.cdiv(tokens, tile), blocks)](
        z, z_sum, tables.gram, tables.offset, bits, row, slot, counts, sums, value, found.value, found.column, tokens,
        blocks, bits.shape[0], sums.stride(0), z.stride(0), z.stride(1), PARTS=z.shape[0], MODULES=tables.modules,
        RANK=tables.rank, RANK_PADDED=triton.next_power_of_2(tables.rank), TILE=tile, FIRST=first,
        num_warps=8 if tables.rank <= 16 else 4,
    )  # fmt: skip
    return found, z_sum[:1]


@triton.jit
def _evidence_kernel(
    z_parts: "Pointer", z_sum: "Pointer", gram: "Pointer", offset: "Pointer", bits: "Pointer", row: "Pointer",
    slot: "Pointer", counts: "Pointer", sums: "Pointer", value: "Pointer", best_value: "Pointer",
    best_column: "Pointer", tokens: int, blocks: int, rows: int, sums_stride: int, part_stride: int, token_stride: int,
    PARTS: tl.constexpr, MODULES: tl.constexpr, RANK: tl.constexpr, RANK_PADDED: tl.constexpr, TILE: tl.constexpr,
    FIRST: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of tokens and one block of adapters, through all modules: value stays in registers between them."""
    block = tl.program_id(1)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    live = token < tokens
    width = blocks * ADAPTER_BLOCK
    COLUMNS: tl.constexpr = MODULES * RANK
    FEATURES: tl.constexpr = RANK * (RANK + 1) // 2
    if PARTS > 1:
        z = z_sum + block.to(tl.int64) * tokens * COLUMNS
        z_stride = COLUMNS
        for module in tl.static_range(MODULES):
            sum_parts(
                z_parts, z, token, live, module * RANK, part_stride, token_stride, PARTS, RANK, RANK_PADDED, COLUMNS
            )  # fmt: skip
        tl.debug_barrier()
    else:
        z = z_parts
        z_stride = token_stride
    column = block * ADAPTER_BLOCK + tl.arange(0, ADAPTER_BLOCK)
    own_row = tl.load(row + token, mask=live, other=0)
    adds = live & (tl.load(counts + token, mask=live, other=0) != 0)
    own_sums = sums + tl.load(slot + token, mask=live, other=0).to(tl.int64)[:, None] * width + column[None, :]
    own_value = value + token.to(tl.int64)[:, None] * width + column[None, :]
    permitted = permitted_tile(bits, rows, width // 32, own_row, column)
    if FIRST:
        total = tl.zeros([TILE, ADAPTER_BLOCK], tl.float64)
    else:
        total = tl.load(own_value, mask=live[:, None], other=0.0)
    for module in tl.static_range(MODULES):
        # Asked for before the score, which takes as long as the load.
        gathered = tl.load(own_sums + module * sums_stride, mask=live[:, None], other=0.0)
        score = score_tile(
            z + module * RANK, z_stride, gram + module * blocks * FEATURES * ADAPTER_BLOCK, offset + module * width,
            token, live, block, RANK,
        )  # fmt: skip
        usable = usable_tile(score)
        gathered += tl.where(adds[:, None], units_tile(score, usable), 0.0).to(tl.float64)
        tl.store(own_sums + module * sums_stride, gathered, mask=adds[:, None])
        total += gathered
        top, lowest = best_in_tile(total, permitted & usable)
        at = (module * tokens + token).to(tl.int64) * blocks + block
        tl.store(best_value + at, top, mask=live)
        tl.store(best_column + at, tl.where(top > float("-inf"), block * ADAPTER_BLOCK + lowest, -1), mask=live)
    tl.store(own_value, total, mask=live[:, None])
