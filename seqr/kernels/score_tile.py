"""The score of a tile of tokens for a block of 64 adapters, inside a kernel: the same function in every mode."""

import triton
import triton.language as tl

from seqr.kernels.numbers import ADAPTER_BLOCK, CLIP, GRID, Pointer, Tile, whole


@triton.jit
def sum_parts(
    z_parts: "Pointer", out: "Pointer", token: "Tile", live: "Tile", first: int, part_stride: int, token_stride: int,
    PARTS: tl.constexpr, RANK: tl.constexpr, RANK_PADDED: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """out[t, first + k] = sum over p, in order, of z_parts[p, t, first + k], for k < r."""
    k = tl.arange(0, RANK_PADDED)
    mask = live[:, None] & (k < RANK)[None, :]
    at = z_parts + token.to(tl.int64)[:, None] * token_stride + (first + k)[None, :]
    total = tl.zeros([token.shape[0], RANK_PADDED], tl.float32)
    for part in range(PARTS):
        total += tl.load(at + part * part_stride, mask=mask, other=0.0)
    tl.store(out + token.to(tl.int64)[:, None] * COLUMNS + (first + k)[None, :], total, mask=mask)


@triton.jit
def score_tile(
    z: "Pointer", z_stride: int, gram: "Pointer", offset: "Pointer", pairs: "Pointer", token: "Tile", live: "Tile",
    block: int, FEATURES: tl.constexpr, FEATURE_STEP: tl.constexpr,
) -> Tile:  # fmt: skip
    """score[t, n] = sqrt(max(0, sum over f of z[t, i_f] z[t, j_f] gram[block, f, n])) - offset[64 block + n]

    z rows of r fp32 at this module; gram [N / 64, F, 64] and offset [N] fp32 as ``seqr.routing.scores`` has them; pairs
    int32 [2, F]: i_f and j_f -> [T, 64] fp32, NaN for an adapter that cannot be used. IEEE fp32 throughout, never TF32:
    F products are added in some order, so the error bound of ``seqr.routing.reference`` holds.
    """
    n = tl.arange(0, ADAPTER_BLOCK)
    rows = z + token.to(tl.int64)[:, None] * z_stride
    block_gram = gram + block * FEATURES * ADAPTER_BLOCK
    square = tl.zeros([token.shape[0], ADAPTER_BLOCK], tl.float32)
    for start in range(0, FEATURES, FEATURE_STEP):
        f = start + tl.arange(0, FEATURE_STEP)
        inside = f < FEATURES
        i = tl.load(pairs + f, mask=inside, other=0)
        j = tl.load(pairs + FEATURES + f, mask=inside, other=0)
        mask = live[:, None] & inside[None, :]
        feature = tl.load(rows + i[None, :], mask=mask, other=0.0) * tl.load(rows + j[None, :], mask=mask, other=0.0)
        weight = tl.load(block_gram + f[:, None] * ADAPTER_BLOCK + n[None, :], mask=inside[:, None], other=0.0)
        square = tl.dot(feature, weight, square, input_precision="ieee")
    # Not tl.maximum: a NaN must stay one, so that it never wins.
    root = tl.sqrt_rn(tl.where(square < 0.0, 0.0, square))
    return root - tl.load(offset + block * ADAPTER_BLOCK + n)[None, :]


@triton.jit
def usable_tile(score: "Tile") -> Tile:
    """Where a score is a number: False for NaN and for infinity."""
    return (score < float("inf")) & (score > float("-inf"))


@triton.jit
def units_tile(score: "Tile", usable: "Tile") -> Tile:
    """The score clipped to [-6, 6] in units of 2^-20, whole, fp32; -6 where not usable (``seqr.routing.evidence``)."""
    clipped = tl.minimum(tl.maximum(score, -CLIP), CLIP)
    return whole(tl.where(usable, clipped, -CLIP) * GRID)


@triton.jit
def best_in_tile(value: "Tile", allowed: "Tile") -> tuple[Tile, Tile]:
    """(the largest allowed value, its lowest column) per row, or (-inf, 0); it must be finite where it is allowed."""
    masked = tl.where(allowed, value, float("-inf"))
    top = tl.max(masked, 1)
    n = tl.arange(0, ADAPTER_BLOCK)
    return top, tl.min(tl.where(masked == top[:, None], n[None, :], ADAPTER_BLOCK), 1)
