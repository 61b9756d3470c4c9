"""z = A x with fp32's accuracy from bf16 x, on the tensor cores: all A's that read the same x in one launch."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from seqr.kernels.numbers import Pointer, bf16_dot

TERMS = 3
TOKEN_TILE = 64
# Up to here the parts of the sum are left to the reader: few tiles of tokens would leave most of a card idle.
PARTS_TOKENS = 1024
_STEP = 64
_STAGES = 4
_MAX_PARTS = 32


@dataclass(frozen=True)
class Projection:
    """A of the modules that read the same x, stacked: C = modules x r rows, over n inputs.

    terms bf16 [3, n, C']: A transposed as the sum of three bf16 numbers, with no remainder (3 x 8 bits hold fp32's 24);
    full fp32 [n, C']: the same for x that is not bf16. C' is C rounded up to a power of two, at least 16.
    """

    columns: int
    terms: torch.Tensor
    full: torch.Tensor

    @classmethod
    def of(cls, a: torch.Tensor) -> "Projection":
        """``a`` [C, n] fp32."""
        columns, inputs = a.shape
        padded = max(16, triton.next_power_of_2(columns))
        full = a.new_zeros(inputs, padded, dtype=torch.float32)
        full[:, :columns] = a.T
        return cls(columns, split_bf16(full), full)


def split_bf16(a: torch.Tensor) -> torch.Tensor:
    """a [...] fp32 = the sum over k of result[k], bf16 [3, ...], largest first: exact unless a is near underflow."""
    terms, rest = [], a.to(torch.float32)
    for _ in range(TERMS):
        terms.append(rest.to(torch.bfloat16))
        rest = rest - terms[-1].to(torch.float32)
    return torch.stack(terms)


def part_length(inputs: int) -> int:
    """How many of the n inputs one part of the sum covers: by n only, so that no batch changes the order of adding."""
    return _STEP * -(-inputs // (_STEP * _MAX_PARTS))


def project(x: torch.Tensor, a: Projection, parts: bool | None = None) -> torch.Tensor:
    """sum over p of z[p, t, c] = sum over j of A[c, j] x[t, j]

    x [T, n] bf16, fp16 or fp32, rows contiguous -> z [P, T, C] fp32. With ``parts`` the P parts of the sum are left to
    be added in order, by ``add_parts`` or a kernel that needs z: more programs for few tokens. Without, P = 1 and they
    have been added in that order. The default is parts for T <= 1,024. A token's z is the same sequence of operations
    for every T and either way.

    Accuracy: the products are exact for bf16 x, and x is widened exactly otherwise. Error of z[t, c], with u = 2^-23
    (tensor cores may truncate where fp32 rounds): at most (3 n + P) u sum |A[c, j]| |x[t, j]|. bf16 A or a bf16 z would
    have 2^-9 in its place, and change decisions.
    """
    tokens, inputs = x.shape
    if parts is None:
        parts = tokens <= PARTS_TOKENS
    length = part_length(inputs)
    count = -(-inputs // length)
    z = x.new_empty(count if parts else 1, tokens, a.columns, dtype=torch.float32)
    exact = x.dtype == torch.bfloat16
    weight = a.terms if exact else a.full
    grid = (triton.cdiv(tokens, TOKEN_TILE), z.shape[0])
    _project_kernel[grid](
        x, weight, z, tokens, inputs, x.stride(0), 1 if parts else count,
        COLUMNS=a.columns, PADDED=weight.shape[-1], LENGTH=length, EXACT=exact, TILE=TOKEN_TILE, STEP=_STEP,
        num_warps=4, num_stages=_STAGES,
    )  # fmt: skip
    return z


@triton.jit
def _project_kernel(
    x: "Pointer", weight: "Pointer", z: "Pointer", tokens: int, inputs: int, x_stride: int, parts_here: int,
    COLUMNS: tl.constexpr, PADDED: tl.constexpr, LENGTH: tl.constexpr, EXACT: tl.constexpr, TILE: tl.constexpr,
    STEP: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of tokens by ``parts_here`` parts of the inputs, each part summed by itself and then added in order."""
    part = tl.program_id(1)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    live = token < tokens
    column = tl.arange(0, PADDED)
    rows = x + token.to(tl.int64)[:, None] * x_stride
    steps: tl.constexpr = LENGTH // STEP
    total = tl.zeros([TILE, PADDED], tl.float32)
    sum = tl.zeros([TILE, PADDED], tl.float32)
    for step in range(parts_here * steps):
        j = part * LENGTH + step * STEP + tl.arange(0, STEP)
        inside = j < inputs
        tile = tl.load(rows + j[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        at = weight + j[:, None] * PADDED + column[None, :]
        if EXACT:
            high = tl.load(at, mask=inside[:, None], other=0.0)
            middle = tl.load(at + inputs * PADDED, mask=inside[:, None], other=0.0)
            low = tl.load(at + 2 * inputs * PADDED, mask=inside[:, None], other=0.0)
            sum = bf16_dot(tile, high, bf16_dot(tile, middle, bf16_dot(tile, low, sum)))
        else:
            full = tl.load(at, mask=inside[:, None], other=0.0)
            sum = tl.dot(tile.to(tl.float32), full, sum, input_precision="ieee")
        ends = (step + 1) % steps == 0
        total = tl.where(ends, total + sum, total)
        sum = tl.where(ends, 0.0, sum)
    out = z + (part * tokens + token).to(tl.int64)[:, None] * COLUMNS + column[None, :]
    tl.store(out, total, mask=live[:, None] & (column < COLUMNS)[None, :])


def add_parts(z: torch.Tensor) -> torch.Tensor:
    """out[0, t, c] = sum over p, in order, of z[p, t, c]: z fp32 [P, T, C], rows contiguous -> [1, T, C]."""
    parts, tokens, columns = z.shape
    if parts == 1:
        return z
    out = z.new_empty(1, tokens, columns)
    tile = 256
    _add_parts_kernel[(triton.cdiv(tokens * columns, tile),)](
        z, out, tokens * columns, columns, z.stride(0), z.stride(1), PARTS=parts, TILE=tile, num_warps=4
    )
    return out


@triton.jit
def _add_parts_kernel(
    z: "Pointer", out: "Pointer", size: int, columns: int, part_stride: int, token_stride: int, PARTS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:  # fmt: skip
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = at < size
    own = z + (at // columns).to(tl.int64) * token_stride + at % columns
    total = tl.zeros([TILE], tl.float32)
    # Unrolled, so that all loads are under way at once.
    for part in tl.static_range(PARTS):
        total += tl.load(own + part * part_stride, mask=inside, other=0.0)
    tl.store(out + at, total, mask=inside)
