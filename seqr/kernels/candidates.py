"""What a split search found: per token and split of the adapters the best one, and the best of all of them."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from seqr.kernels.numbers import Pointer, Tile

_LARGEST = tl.constexpr(2147483647)


@dataclass(frozen=True)
class Candidates:
    """value [M, T, S] fp32 or fp64 and column int32 [M, T, S]: module, token, split; column -1 for nobody.

    With S = 1 the column is the choice, and ``value`` is not read: ``settled`` makes such ones of choices made before.
    """

    value: torch.Tensor
    column: torch.Tensor

    @classmethod
    def empty(cls, modules: int, tokens: int, splits: int, dtype: torch.dtype, device: torch.device) -> "Candidates":
        """Room for what a kernel will write."""
        shape = (modules, tokens, splits)
        value = torch.empty(shape, dtype=dtype, device=device)
        return cls(value, torch.empty(shape, dtype=torch.int32, device=device))

    @classmethod
    def settled(cls, column: torch.Tensor, modules: int) -> "Candidates":
        """column int32 [T], the same for all modules; nothing is copied."""
        column = column.view(1, -1, 1).expand(modules, -1, 1)
        return cls(column, column)

    @property
    def splits(self) -> int:
        return self.column.shape[2]

    @property
    def stride(self) -> int:
        """Elements between one module and the next."""
        return self.column.stride(0)

    def choice(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """choice[m, t] = column[m, t, s] of the largest value, the lowest column among equals: int32 [M, T], or -1.

        Written to ``out`` [M, T], contiguous, if given.
        """
        modules, tokens, splits = self.column.shape
        if splits == 1:
            return self.column[:, :, 0] if out is None else out.copy_(self.column[:, :, 0])
        out = self.column.new_empty(modules, tokens) if out is None else out
        padded, tile = triton.next_power_of_2(splits), 16
        grid = (triton.cdiv(tokens, tile), modules)
        _choice_kernel[grid](self.value, self.column, out, tokens, self.stride, SPLITS=splits, PADDED=padded, TILE=tile)
        return out


@triton.jit
def best_of(
    value: "Pointer", column: "Pointer", at: "Tile", live: "Tile", SPLITS: tl.constexpr, PADDED: tl.constexpr
) -> Tile:
    """The column of the best of S candidates from ``at`` on, per row of ``at`` [T] -> int32 [T], -1 for nobody."""
    if SPLITS == 1:
        return tl.load(column + at, mask=live, other=-1)
    s = tl.arange(0, PADDED)
    mask = live[:, None] & (s < SPLITS)[None, :]
    values = tl.load(value + at[:, None] + s[None, :], mask=mask, other=float("-inf"))
    columns = tl.load(column + at[:, None] + s[None, :], mask=mask, other=-1)
    top = tl.max(values, 1)
    best = tl.min(tl.where((values == top[:, None]) & (columns >= 0), columns, _LARGEST), 1)
    return tl.where(best == _LARGEST, -1, best)


@triton.jit
def _choice_kernel(
    value: "Pointer", column: "Pointer", out: "Pointer", tokens: int, module_stride: int, SPLITS: tl.constexpr,
    PADDED: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    module = tl.program_id(1)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    live = token < tokens
    at = module.to(tl.int64) * module_stride + token.to(tl.int64) * SPLITS
    tl.store(out + module * tokens + token, best_of(value, column, at, live, SPLITS, PADDED), mask=live)
