"""Numbers inside kernels: what bf16 and whole numbers mean, on the card and in Triton's interpreter alike."""

from typing import Any

import triton
import triton.language as tl
from triton import knobs

# A tensor of device memory, as Triton hands it to a kernel, or a tile of one.
Pointer = Any
Tile = Any
# Three tiles that are one in three terms or sums, the largest first.
Terms = Any

# Triton's interpreter (3.6 to 3.9) truncates to bf16 and multiplies bf16 by its bit patterns; the branches on this
# flag give it the card's meaning. They cost the card nothing: they are decided when the kernel is compiled.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)
ADAPTER_BLOCK = tl.constexpr(64)
CLIP = tl.constexpr(6.0)
GRID = tl.constexpr(1048576.0)


@triton.jit
def rounded(x: "Tile", dtype: tl.constexpr) -> Tile:
    """``x`` fp32 rounded once to ``dtype``, to nearest, half to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        near = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, near, bits).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def whole(x: "Tile") -> Tile:
    """``x`` rounded to a whole number, half to even: fp32, |x| <= 2^23, where fp32 numbers from 2^23 on are whole."""
    near = (tl.abs(x) + 8388608.0) - 8388608.0
    return tl.where(x < 0.0, -near, near)


@triton.jit
def bf16_dot(a: "Tile", b: "Tile", sum: "Tile") -> Tile:
    """``sum`` + a b: a [M, K], b [K, N] bf16, sum [M, N] fp32. Each product is exact; the additions are fp32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sum, input_precision="ieee")
    return tl.dot(a, b, sum)


@triton.jit
def bf16_terms(a: "Tile") -> Terms:
    """fp32 ``a`` as the sum of three bf16 tiles, largest first: exact unless near underflow; NaN where not finite."""
    high = rounded(a, tl.bfloat16)
    rest = a - high.to(tl.float32)
    middle = rounded(rest, tl.bfloat16)
    return high, middle, rounded(rest - middle.to(tl.float32), tl.bfloat16)


@triton.jit
def exact_dot(a: "Tile", b: "Tile", sum: "Tile") -> Tile:
    """``sum`` + a b for a [M, K] fp32 and b [K, N] bf16, with exact products."""
    high, middle, low = bf16_terms(a)
    return bf16_dot(high, b, bf16_dot(middle, b, bf16_dot(low, b, sum)))
