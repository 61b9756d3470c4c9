"""Accumulated evidence for one token per sequence, in two kernels: units (``evidence_units``), then sums and choice.

The first has all modules of a site side by side; one kernel for both would take them one after another.
"""

import torch
import triton
import triton.language as tl

from seqr.kernels.candidates import Candidates
from seqr.kernels.evidence_units import evidence_units, unit_and_usable
from seqr.kernels.numbers import ADAPTER_BLOCK, Pointer
from seqr.kernels.permission_bits import permitted_tile
from seqr.kernels.score_tile import best_in_tile
from seqr.kernels.tables import SiteTables

# Tokens per program: few, as there is little to do for each and nobody should wait.
_TILE = 4


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
    tokens, width = z.shape[1], tables.adapters
    units, _, z_sum = evidence_units(z, tables, counts)
    blocks = width // ADAPTER_BLOCK.value
    found = Candidates.empty(tables.modules, tokens, blocks, torch.float64, z.device)
    _add_kernel[(triton.cdiv(tokens, _TILE), blocks)](
        units, bits, row, slot, counts, sums, value, found.value, found.column, tokens, blocks, bits.shape[0],
        sums.stride(0), MODULES=tables.modules, TILE=_TILE, FIRST=first, num_warps=4,
    )  # fmt: skip
    return found, z_sum


@triton.jit
def _add_kernel(
    units: "Pointer", bits: "Pointer", row: "Pointer", slot: "Pointer", counts: "Pointer", sums: "Pointer",
    value: "Pointer", best_value: "Pointer", best_column: "Pointer", tokens: int, blocks: int, rows: int,
    sums_stride: int, MODULES: tl.constexpr, TILE: tl.constexpr, FIRST: tl.constexpr,
) -> None:  # fmt: skip
    """A few tokens and one block of adapters, through all modules: value stays in registers between them."""
    block = tl.program_id(1)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    live = token < tokens
    width = blocks * ADAPTER_BLOCK
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
        at = units + (module * tokens + token).to(tl.int64)[:, None] * width + column[None, :]
        unit, usable = unit_and_usable(tl.load(at, mask=live[:, None], other=0))
        gathered = tl.load(own_sums + module * sums_stride, mask=live[:, None], other=0.0) + unit.to(tl.float64)
        tl.store(own_sums + module * sums_stride, gathered, mask=adds[:, None])
        total += gathered
        top, lowest = best_in_tile(total, permitted & usable)
        to = (module * tokens + token).to(tl.int64) * blocks + block
        tl.store(best_value + to, top, mask=live)
        tl.store(best_column + to, tl.where(top > float("-inf"), block * ADAPTER_BLOCK + lowest, -1), mask=live)
    tl.store(own_value, total, mask=live[:, None])
