"""The score of a tile of tokens for a block of 64 adapters, inside a kernel: the same function in every mode."""

import triton
import triton.language as tl

from seqr.kernels.numbers import ADAPTER_BLOCK, CLIP, GRID, Pointer, Tile, bf16_dot, bf16_terms, whole

# Features per step: the same in every kernel, as it decides the order of adding.
FEATURE_STEP = tl.constexpr(16)


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
    # Unrolled, so that all loads are under way at once.
    for part in tl.static_range(PARTS):
        total += tl.load(at + part * part_stride, mask=mask, other=0.0)
    tl.store(out + token.to(tl.int64)[:, None] * COLUMNS + (first + k)[None, :], total, mask=mask)


@triton.jit
def score_tile(
    z: "Pointer", z_stride: int, gram: "Pointer", offset: "Pointer", token: "Tile", live: "Tile", block: int,
    RANK: tl.constexpr,
) -> Tile:  # fmt: skip
    """score[t, n] = sqrt(max(0, sum over f of z[t, i_f] z[t, j_f] gram[block, f, n])) - offset[64 block + n]

    z rows of r fp32 at this module; gram [N / 64, F, 64] and offset [N] fp32 as ``seqr.routing.scores`` has them, with
    i_f <= j_f row by row -> [T, 64] fp32, NaN for an adapter that cannot be used.

    Features and gram as three bf16 terms each, six of the nine products on the tensor cores; what the other three would
    add is below 2^-25 of S = sum of |feature x gram|. Products of one size have a sum of their own, so that the error
    of the square is at most (1.02 F + 6) u S with u = 2^-23 (tensor cores may truncate where fp32 rounds).
    """
    FEATURES: tl.constexpr = RANK * (RANK + 1) // 2
    n = tl.arange(0, ADAPTER_BLOCK)
    rows = z + token.to(tl.int64)[:, None] * z_stride
    block_gram = gram + block * FEATURES * ADAPTER_BLOCK
    large = tl.zeros([token.shape[0], ADAPTER_BLOCK], tl.float32)
    small = tl.zeros([token.shape[0], ADAPTER_BLOCK], tl.float32)
    least = tl.zeros([token.shape[0], ADAPTER_BLOCK], tl.float32)
    for start in range(0, FEATURES, FEATURE_STEP):
        f = start + tl.arange(0, FEATURE_STEP)
        inside = f < FEATURES
        # i = how many of the rows after the first begin at f or before. Counted, as a table would be one more wait.
        i = f * 0
        for k in tl.static_range(1, RANK):
            i += (f >= k * RANK - k * (k - 1) // 2).to(tl.int32)
        j = f - (i * RANK - i * (i - 1) // 2) + i
        mask = live[:, None] & inside[None, :]
        feature = tl.load(rows + i[None, :], mask=mask, other=0.0) * tl.load(rows + j[None, :], mask=mask, other=0.0)
        weight = tl.load(block_gram + f[:, None] * ADAPTER_BLOCK + n[None, :], mask=inside[:, None], other=0.0)
        high, middle, low = bf16_terms(feature)
        weight_high, weight_middle, weight_low = bf16_terms(weight)
        least = bf16_dot(high, weight_low, bf16_dot(middle, weight_middle, bf16_dot(low, weight_high, least)))
        small = bf16_dot(high, weight_middle, bf16_dot(middle, weight_high, small))
        large = bf16_dot(high, weight_high, large)
    square = large + (small + least)
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
