"""Per-token routing in one kernel: features, product, score, permission bit, running argmax. No T x N is written."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from seqr.kernels.candidates import Candidates
from seqr.kernels.numbers import ADAPTER_BLOCK, Pointer
from seqr.kernels.permission_bits import permitted_tile
from seqr.kernels.score_tile import (
    add_products,
    best_in_tile,
    gram_terms,
    held_features,
    no_products,
    score_of,
    score_tile,
    sum_parts,
    usable_tile,
)  # fmt: skip
from seqr.kernels.tables import SiteTables, steps
from seqr.routing.features import feature_count

# Up to here one program takes 16 tokens, so that there are enough programs; beyond, 64: gram is read less often then.
DECODE_TOKENS = 64
_MANY = 64
# Programs that keep an H200's 132 multiprocessors busy, and how far N is split for it.
_PROGRAMS = 768
_MOST_SPLITS = 256


@dataclass(frozen=True)
class Tiling:
    """How programs share out T tokens and N / 64 blocks of adapters: S splits of ``per_split`` blocks."""

    tile: int
    tiles: int
    splits: int
    per_split: int
    warps: int
    stages: int

    @classmethod
    def of(cls, tokens: int, tables: SiteTables) -> "Tiling":
        """By the sizes only."""
        tile = 16 if tokens <= DECODE_TOKENS else _MANY
        return cls.of_tiles(tile, triton.cdiv(tokens, tile), tables)

    @classmethod
    def of_tiles(cls, tile: int, tiles: int, tables: SiteTables) -> "Tiling":
        """For ``tiles`` runs of at most ``tile`` tokens."""
        blocks = tables.adapters // ADAPTER_BLOCK.value
        splits = max(1, min(blocks, _MOST_SPLITS, _PROGRAMS // (tiles * tables.modules)))
        per_split = triton.cdiv(blocks, splits)
        splits = triton.cdiv(blocks, per_split)
        # Features of a high rank are made again for each block, which takes registers. Else loading a block's gram
        # ahead is worth less than the programs for which its memory leaves no room (measured on an H200).
        long = steps(feature_count(tables.rank))[1] > 1
        return cls(tile, tiles, splits, per_split, 8 if long and tile > 16 else 4, 2 if long else 1)


def summed(z: torch.Tensor, copies: int) -> torch.Tensor:
    """Where a kernel leaves the sum of z's parts [P, T, C]: [copies, T, C], one copy per program that needs it.

    Each copy is written and read by the programs of one split only, so that nobody waits for another. With P = 1 there
    is nothing to add, and the result is z itself.
    """
    return z if z.shape[0] == 1 else z.new_empty(copies, z.shape[1], z.shape[2])


def route_tokens(
    z: torch.Tensor, tables: SiteTables, bits: torch.Tensor, row: torch.Tensor
) -> tuple[Candidates, torch.Tensor]:
    """choice[m, t] = argmax over n permitted to row[t] of score_n(z[t, m]); and z with its parts added, [1, T, M r].

    z fp32 [P, T, M r] (``project``: module m's r columns from m r on), bits int32 [rows, N / 32] (``pack_bits``), row
    int32 [T] -> Candidates [M, T, S] fp32. A score that is not finite never wins, ties go to the lowest column, -1
    where nothing is permitted: ``seqr.routing.per_token``. The time it takes depends on T and N, not on permissions.
    """
    tokens, tiling = z.shape[1], Tiling.of(z.shape[1], tables)
    z_sum = summed(z, tiling.splits)
    found = Candidates.empty(tables.modules, tokens, tiling.splits, torch.float32, z.device)
    main, count, rest = steps(feature_count(tables.rank))
    _route_kernel[(tiling.tiles, tiling.splits, tables.modules)](
        z, z_sum, tables.gram_terms, tables.offset, bits, row, found.value, found.column, tokens,
        tables.adapters // ADAPTER_BLOCK.value, tiling.per_split, bits.shape[0], tiling.splits, z.stride(0),
        z.stride(1), PARTS=z.shape[0], RANK=tables.rank, RANK_PADDED=triton.next_power_of_2(tables.rank),
        COLUMNS=tables.modules * tables.rank, MAIN=main, STEPS=count, REST=rest, AHEAD=count == tiling.per_split == 1,
        TILE=tiling.tile, num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip
    return found, z_sum[:1]


@triton.jit
def _route_kernel(
    z_parts: "Pointer", z_sum: "Pointer", gram: "Pointer", offset: "Pointer", bits: "Pointer", row: "Pointer",
    best_value: "Pointer", best_column: "Pointer", tokens: int, blocks: int, per_split: int, rows: int, splits: int,
    part_stride: int, token_stride: int, PARTS: tl.constexpr, RANK: tl.constexpr, RANK_PADDED: tl.constexpr,
    COLUMNS: tl.constexpr, MAIN: tl.constexpr, STEPS: tl.constexpr, REST: tl.constexpr, AHEAD: tl.constexpr,
    TILE: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of tokens, one run of adapter blocks, one module."""
    split = tl.program_id(1)
    module = tl.program_id(2)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    live = token < tokens
    first = module * RANK
    ROWS: tl.constexpr = MAIN * STEPS + REST
    module_gram = gram + module * blocks * (3 * ROWS * ADAPTER_BLOCK)
    module_offset = offset + module * blocks * ADAPTER_BLOCK
    n = tl.arange(0, ADAPTER_BLOCK)
    if AHEAD:
        # One block: its gram does not depend on z, and is under way while z is made.
        own_gram = module_gram + split * (3 * ROWS * ADAPTER_BLOCK)
        main_gram = gram_terms(own_gram, 0, MAIN, ROWS)
        rest_gram = gram_terms(own_gram, MAIN, REST, ROWS)
        own_offset = tl.load(module_offset + split * ADAPTER_BLOCK + n)
    own_row = tl.load(row + token, mask=live, other=0)
    if PARTS > 1:
        own = z_sum + split.to(tl.int64) * tokens * COLUMNS
        sum_parts(
            z_parts, own, token, live, first, part_stride, token_stride, PARTS, RANK, RANK_PADDED, COLUMNS
        )  # fmt: skip
        tl.debug_barrier()
        z = own + first
        z_stride = COLUMNS
    else:
        z = z_parts + first
        z_stride = token_stride
    main, rest = held_features(z, z_stride, token, live, RANK, MAIN, STEPS, REST)
    best = tl.full([TILE], float("-inf"), tl.float32)
    chosen = tl.full([TILE], -1, tl.int32)
    for block in range(split * per_split, tl.minimum((split + 1) * per_split, blocks)):
        if AHEAD:
            sums = add_products(no_products(token), main, main_gram)
            score = score_of(add_products(sums, rest, rest_gram), own_offset)
        else:
            score = score_tile(
                z, z_stride, module_gram, module_offset, token, live, block, main, rest, RANK, MAIN, STEPS, REST
            )  # fmt: skip
        column = block * ADAPTER_BLOCK + n
        allowed = permitted_tile(bits, rows, blocks * (ADAPTER_BLOCK // 32), own_row, column)
        top, lowest = best_in_tile(score, allowed & usable_tile(score))
        better = top > best
        chosen = tl.where(better, block * ADAPTER_BLOCK + lowest, chosen)
        best = tl.where(better, top, best)
    at = (module * tokens + token).to(tl.int64) * splits + split
    tl.store(best_value + at, best, mask=live)
    tl.store(best_column + at, chosen, mask=live)
