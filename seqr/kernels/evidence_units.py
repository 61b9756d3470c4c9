"""Accumulated evidence, first step: every clipped score as a whole number of units, all modules of a site at once."""

import torch
import triton
import triton.language as tl

from seqr.kernels.numbers import ADAPTER_BLOCK, Pointer, Tile
from seqr.kernels.route import Tiling, summed
from seqr.kernels.score_tile import (
    add_products,
    gram_terms,
    held_features,
    no_products,
    score_of,
    score_tile,
    sum_parts,
    units_tile,
    usable_tile,
)  # fmt: skip
from seqr.kernels.tables import SiteTables, steps
from seqr.routing.features import feature_count

# A unit of a score that is not usable is stored this much lower: units are below 2^23, so both can be told apart.
_UNUSABLE = tl.constexpr(1 << 30)


def evidence_units(
    z: torch.Tensor, tables: SiteTables, counts: torch.Tensor, chunk: torch.Tensor | None = None, size: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """units int32 [M, T, N], totals int32 [M, C, N] and z with its parts added [1, T, M r].

    units[m, t, n] = the clipped score in units of 2^-20, 0 where not counts[t], both 2^30 lower where it is not usable
    (``unit_and_usable``). ``chunk`` int32 [2, C] (first token, length <= size): totals are the sums of units per chunk;
    without it C = 0. z fp32 [P, T, M r], counts int8 [T].
    """
    tokens = z.shape[1]
    tiling = Tiling.of(tokens, tables) if chunk is None else Tiling.of_tiles(size, chunk.shape[1], tables)
    z_sum = summed(z, tiling.splits)
    units = torch.empty(tables.modules, tokens, tables.adapters, dtype=torch.int32, device=z.device)
    totals = units.new_empty(tables.modules, tiling.tiles if chunk is not None else 0, tables.adapters)
    main, count, rest = steps(feature_count(tables.rank))
    _units_kernel[(tiling.tiles, tiling.splits, tables.modules)](
        z, z_sum, tables.gram_terms, tables.offset, counts if chunk is None else chunk, counts, units, totals, tokens,
        tiling.tiles, tables.adapters // ADAPTER_BLOCK.value, tiling.per_split, z.stride(0), z.stride(1),
        PARTS=z.shape[0], RANK=tables.rank, RANK_PADDED=triton.next_power_of_2(tables.rank),
        COLUMNS=tables.modules * tables.rank, MAIN=main, STEPS=count, REST=rest, AHEAD=count == tiling.per_split == 1,
        TILE=tiling.tile, CHUNKED=chunk is not None, num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip
    return units, totals, z_sum[:1]


@triton.jit
def _units_kernel(
    z_parts: "Pointer", z_sum: "Pointer", gram: "Pointer", offset: "Pointer", chunk: "Pointer", counts: "Pointer",
    units: "Pointer", totals: "Pointer", tokens: int, chunks: int, blocks: int, per_split: int, part_stride: int,
    token_stride: int, PARTS: tl.constexpr, RANK: tl.constexpr, RANK_PADDED: tl.constexpr, COLUMNS: tl.constexpr,
    MAIN: tl.constexpr, STEPS: tl.constexpr, REST: tl.constexpr, AHEAD: tl.constexpr, TILE: tl.constexpr,
    CHUNKED: tl.constexpr,
) -> None:  # fmt: skip
    """One tile or chunk of tokens, one run of adapter blocks, one module."""
    c = tl.program_id(0)
    split = tl.program_id(1)
    module = tl.program_id(2)
    ROWS: tl.constexpr = MAIN * STEPS + REST
    width = blocks * ADAPTER_BLOCK
    module_gram = gram + module * blocks * (3 * ROWS * ADAPTER_BLOCK)
    module_offset = offset + module * width
    n = tl.arange(0, ADAPTER_BLOCK)
    if AHEAD:
        # One block: its gram does not depend on z, and is under way while z is made.
        own_gram = module_gram + split * (3 * ROWS * ADAPTER_BLOCK)
        main_gram = gram_terms(own_gram, 0, MAIN, ROWS)
        rest_gram = gram_terms(own_gram, MAIN, REST, ROWS)
        own_offset = tl.load(module_offset + split * ADAPTER_BLOCK + n)
    if CHUNKED:
        token = tl.load(chunk + c) + tl.arange(0, TILE)
        live = tl.arange(0, TILE) < tl.load(chunk + chunks + c)
    else:
        token = c * TILE + tl.arange(0, TILE)
        live = token < tokens
    adds = live & (tl.load(counts + token, mask=live, other=0) != 0)
    if PARTS > 1:
        own = z_sum + split.to(tl.int64) * tokens * COLUMNS
        sum_parts(
            z_parts, own, token, live, module * RANK, part_stride, token_stride, PARTS, RANK, RANK_PADDED, COLUMNS
        )  # fmt: skip
        tl.debug_barrier()
        z = own + module * RANK
        z_stride = COLUMNS
    else:
        z = z_parts + module * RANK
        z_stride = token_stride
    main, rest = held_features(z, z_stride, token, live, RANK, MAIN, STEPS, REST)
    rows = units + (module * tokens + token).to(tl.int64)[:, None] * width
    for block in range(split * per_split, tl.minimum((split + 1) * per_split, blocks)):
        if AHEAD:
            sums = add_products(no_products(token), main, main_gram)
            score = score_of(add_products(sums, rest, rest_gram), own_offset)
        else:
            score = score_tile(
                z, z_stride, module_gram, module_offset, token, live, block, main, rest, RANK, MAIN, STEPS, REST
            )  # fmt: skip
        usable = usable_tile(score)
        unit = tl.where(adds[:, None], units_tile(score, usable), 0.0).to(tl.int32)
        column = block * ADAPTER_BLOCK + n
        tl.store(rows + column[None, :], tl.where(usable, unit, unit - _UNUSABLE), mask=live[:, None])
        if CHUNKED:
            tl.store(totals + (module * chunks + c).to(tl.int64) * width + column, tl.sum(unit, 0))


@triton.jit
def unit_and_usable(stored: "Tile") -> tuple[Tile, Tile]:
    """What ``evidence_units`` stored: (the unit, whether its score was usable)."""
    usable = stored > -(_UNUSABLE // 2)
    return tl.where(usable, stored, stored + _UNUSABLE), usable
