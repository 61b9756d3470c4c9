"""Permitted sets as bits: what a kernel tests for every token and adapter."""

import torch
import triton
import triton.language as tl

from seqr.kernels.numbers import Pointer, Tile


def pack_bits(table: torch.Tensor) -> torch.Tensor:
    """bits[p, n // 32] has bit n % 32 set where table[p, n]: table bool [P, N] -> int32 [P, ceil(N / 32)]."""
    rows, columns = table.shape
    padded = table.new_zeros(rows, -(-columns // 32), 32)
    padded.view(rows, -1)[:, :columns] = table
    weight = torch.tensor([1 << bit for bit in range(31)] + [-(1 << 31)], device=table.device)
    return (padded.to(torch.int64) * weight).sum(2).to(torch.int32)


@triton.jit
def permitted_tile(bits: "Pointer", rows: int, words: int, row: "Tile", column: "Tile") -> Tile:
    """bool [T, N]: bit column[n] of row[t]. Row 0, and a row that does not exist, permits nobody: it fails closed."""
    known = (row > 0) & (row < rows)
    word = tl.load(bits + row[:, None] * words + (column // 32)[None, :], mask=known[:, None], other=0)
    return ((word >> (column % 32)[None, :]) & 1) != 0
