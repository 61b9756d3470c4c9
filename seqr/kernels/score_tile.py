"""The score of a tile of tokens for a block of 64 adapters, inside a kernel: the same function in every mode."""

import triton
import triton.language as tl

from seqr.kernels.numbers import ADAPTER_BLOCK, CLIP, GRID, Pointer, Terms, Tile, bf16_dot, bf16_terms, whole


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
def feature_terms(
    z: "Pointer", z_stride: int, token: "Tile", live: "Tile", start: int, RANK: tl.constexpr, LENGTH: tl.constexpr
) -> Terms:
    """z[t, i_f] z[t, j_f] for f = start ..., with i_f <= j_f row by row and 0 from F on: bf16 [T, LENGTH] three times.

    z rows of r fp32 at this module.
    """
    f = start + tl.arange(0, LENGTH)
    inside = f < RANK * (RANK + 1) // 2
    # i = how many of the rows after the first begin at f or before. Counted, as a table would be one more wait.
    i = f * 0
    for k in tl.static_range(1, RANK):
        i += (f >= k * RANK - k * (k - 1) // 2).to(tl.int32)
    j = f - (i * RANK - i * (i - 1) // 2) + i
    mask = live[:, None] & inside[None, :]
    rows = z + token.to(tl.int64)[:, None] * z_stride
    return bf16_terms(
        tl.load(rows + i[None, :], mask=mask, other=0.0) * tl.load(rows + j[None, :], mask=mask, other=0.0)
    )


@triton.jit
def held_features(
    z: "Pointer", z_stride: int, token: "Tile", live: "Tile", RANK: tl.constexpr, MAIN: tl.constexpr,
    STEPS: tl.constexpr, REST: tl.constexpr,
) -> tuple[Terms, Terms]:  # fmt: skip
    """``main`` and ``rest`` of ``score_tile``: what it takes to score any number of blocks."""
    rest = feature_terms(z, z_stride, token, live, MAIN * STEPS, RANK, REST)
    main = rest
    if STEPS == 1:
        main = feature_terms(z, z_stride, token, live, 0, RANK, MAIN)
    return main, rest


@triton.jit
def gram_terms(block: "Pointer", start: int, LENGTH: tl.constexpr, ROWS: tl.constexpr) -> Terms:
    """Rows start ... of a block of ``SiteTables.gram_terms`` [3, ROWS, 64]: bf16 [LENGTH, 64] three times."""
    f = start + tl.arange(0, LENGTH)
    at = block + f[:, None] * ADAPTER_BLOCK + tl.arange(0, ADAPTER_BLOCK)[None, :]
    return tl.load(at), tl.load(at + ROWS * ADAPTER_BLOCK), tl.load(at + 2 * ROWS * ADAPTER_BLOCK)


@triton.jit
def add_products(sums: "Terms", feature: "Terms", weight: "Terms") -> Terms:
    """Add six of the nine products of terms to fp32 [T, 64] three times: products of one size have a sum of their own.

    What the other three would add is below 2^-25 of S = sum of |feature x gram|. The error of the three sums' sum is at
    most (1.02 F + 6) u S with u = 2^-23 (tensor cores may truncate where fp32 rounds).
    """
    large, small, least = sums
    high, middle, low = feature
    weight_high, weight_middle, weight_low = weight
    least = bf16_dot(high, weight_low, bf16_dot(middle, weight_middle, bf16_dot(low, weight_high, least)))
    small = bf16_dot(high, weight_middle, bf16_dot(middle, weight_high, small))
    return bf16_dot(high, weight_high, large), small, least


@triton.jit
def no_products(token: "Tile") -> Terms:
    """What ``add_products`` begins with."""
    zero = tl.zeros([token.shape[0], ADAPTER_BLOCK], tl.float32)
    return zero, zero, zero


@triton.jit
def score_of(sums: "Terms", offset: "Tile") -> Tile:
    """sqrt(max(0, large + (small + least))) - offset[n]: fp32 [T, 64], NaN for an adapter that cannot be used."""
    large, small, least = sums
    square = large + (small + least)
    # Not tl.maximum: a NaN must stay one, so that it never wins.
    return tl.sqrt_rn(tl.where(square < 0.0, 0.0, square)) - offset[None, :]


@triton.jit
def score_tile(
    z: "Pointer", z_stride: int, gram: "Pointer", offset: "Pointer", token: "Tile", live: "Tile", block: int,
    main: "Terms", rest: "Terms", RANK: tl.constexpr, MAIN: tl.constexpr,
    STEPS: tl.constexpr, REST: tl.constexpr,
) -> Tile:  # fmt: skip
    """score[t, n] = sqrt(max(0, sum over f of z[t, i_f] z[t, j_f] gram[block, f, n])) - offset[64 block + n]

    gram: this module's ``SiteTables.gram_terms`` [N / 64, 3, F', 64], F' = MAIN STEPS + REST; offset fp32 [N]. ``rest``
    has the features of the last REST rows, ``main`` those before if they are one step; else they are made here.
    """
    ROWS: tl.constexpr = MAIN * STEPS + REST
    own = gram + block * (3 * ROWS * ADAPTER_BLOCK)
    sums = no_products(token)
    if STEPS == 1:
        sums = add_products(sums, main, gram_terms(own, 0, MAIN, ROWS))
    else:
        for step in range(STEPS):
            feature = feature_terms(z, z_stride, token, live, step * MAIN, RANK, MAIN)
            sums = add_products(sums, feature, gram_terms(own, step * MAIN, MAIN, ROWS))
    sums = add_products(sums, rest, gram_terms(own, MAIN * STEPS, REST, ROWS))
    return score_of(sums, tl.load(offset + block * ADAPTER_BLOCK + tl.arange(0, ADAPTER_BLOCK)))


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
