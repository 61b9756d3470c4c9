"""The matrix products of routing: in true fp32, and with bits that no neighbour can change.

A BLAS chooses its kernel, and with it the order in which it adds, by the shape of the product. That order decides the
last bit of a score, and the last bit can decide a tie. So the shapes here are fixed, and what varies is the number of
equal products in one batched call:

- ``project`` and ``row_product`` multiply 16 rows at a time, always 16: neither a token's z nor what its adapter adds
  depends on who else is in the batch.
- ``score_product`` multiplies by 64 columns at a time, always 64, and by a multiple of 16 rows, at most 512: an
  adapter's score depends neither on which other adapters exist nor on its own column, and on CPUs not on the batch.

Within one shape a column's (and a row's) bits depend on its own numbers only; tests/seqr/test_routing_invariance.py
holds this for every shape that can occur. Between shapes they differ, and by CPU: on an AMD EPYC with AVX2 a product of
fewer than 8 rows adds in another order than a larger one, which an Intel CPU with AVX-512 does from one row to two. On
a GPU each is one product, and a token's bits may differ between batch sizes.
"""

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F

ROW_TILE = 16
COLUMN_BLOCK = 64
_MAX_ROWS = 512


def project(x: torch.Tensor, a_t: torch.Tensor) -> torch.Tensor:
    """z = A x in fp32: x [T, n] of any dtype, a_t [n, r] fp32 (A transposed) -> [T', r].

    T' is T rounded up to a multiple of 16; the rows from T on are zero. A transposed view of A [r, n] is the faster
    ``a_t``: the product then runs along both operands' contiguous axis.
    """
    tokens, rows = x.shape[0], -(-x.shape[0] // ROW_TILE) * ROW_TILE
    if x.device.type != "cpu":
        z = torch.mm(x.to(torch.float32), a_t)
        return F.pad(z, (0, 0, 0, rows - tokens)) if rows != tokens else z
    if rows != tokens:
        padded = x.new_zeros(rows, x.shape[1], dtype=torch.float32)
        padded[:tokens] = x
        x = padded
    elif x.dtype != torch.float32 or not x.is_contiguous():
        x = x.to(torch.float32).contiguous()
    return row_product(x, a_t)


def row_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T', n] by weight [n, m], both fp32, x contiguous, T' a multiple of 16 -> [T', m].

    On a CPU a row's bits depend on nothing but that row and the weight.
    """
    if x.device.type != "cpu":
        return torch.mm(x, weight)
    tiles = x.view(x.shape[0] // ROW_TILE, ROW_TILE, x.shape[1])
    return _products(tiles, weight.expand(tiles.shape[0], *weight.shape)).view(x.shape[0], weight.shape[1])


def score_product(features: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """features [T, F] fp32 by the columns of blocks [N / 64, F, 64] fp32 -> [T, N] fp32."""
    product = block_product(features, blocks)
    return product.transpose(0, 1).reshape(product.shape[1], -1)[: features.shape[0]]


def block_product(features: torch.Tensor, blocks: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``score_product`` as it falls out of the batched call: [N / 64, T', 64], T' = T rounded up to a multiple of 16.

    The rows from T on are products of zeros. out: where it is to be put.
    """
    missing = -features.shape[0] % ROW_TILE
    if missing:
        features = F.pad(features, (0, 0, 0, missing))
    if features.shape[0] <= _MAX_ROWS:
        return _products(features.expand(blocks.shape[0], -1, -1), blocks, out)
    return torch.cat([block_product(chunk, blocks) for chunk in torch.split(features, _MAX_ROWS)], dim=1, out=out)


def _products(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """``torch.bmm`` with each product's bits the same in any company, and without any.

    A BLAS may let several threads share one product, and add in another order then, where a call has fewer products
    than there are threads: MKL does, with AVX2 and with AVX-512. So a call never has fewer.
    """
    count, threads = left.shape[0], torch.get_num_threads()
    if count >= threads or count == 0 or left.device.type != "cpu":
        return torch.bmm(left, right, out=out)
    if count == 1:
        product = torch.bmm(left.expand(threads, -1, -1), right.expand(threads, -1, -1))[:1]
    else:
        more = [torch.cat((side, side[:1].expand(threads - count, -1, -1))) for side in (left, right)]
        product = torch.bmm(*more)[:count]
    return product if out is None else out.copy_(product)


def unsteady(weights: Iterable[torch.Tensor], features: int, any_batch: bool = False) -> str | None:
    """A product for which the above does not hold, on this CPU with this number of threads; None where it was not seen.

    weights: what ``row_product`` will be given, fp32 [n, m]; features: F of ``score_product``, whose bits must be the
    same beside other adapters, and with ``any_batch`` beside other tokens. Some milliseconds each.
    """
    dice = torch.Generator().manual_seed(0)
    for weight in weights:
        x = torch.randn(8 * ROW_TILE, weight.shape[0], generator=dice)
        beside_others = row_product(x, weight)
        for rows in (ROW_TILE, 2 * ROW_TILE, 3 * ROW_TILE):
            if not torch.equal(row_product(x[-rows:], weight), beside_others[-rows:]):
                return f"a product of {rows} rows by {weight.shape[0]} x {weight.shape[1]}"
    blocks = torch.randn(8, features, COLUMN_BLOCK, generator=dice)
    of_tokens = torch.randn(_MAX_ROWS, features, generator=dice)
    for rows in (ROW_TILE, 4 * ROW_TILE):
        beside_others = block_product(of_tokens[:rows], blocks)
        for count in (1, 2, 3):
            if not torch.equal(block_product(of_tokens[:rows], blocks[-count:]), beside_others[-count:]):
                return f"a product of {rows} rows of {features} features by {count} x {COLUMN_BLOCK} adapters"
        if any_batch and not torch.equal(block_product(of_tokens, blocks)[:, :rows], beside_others):
            return f"a product of {rows} rows of {features} features"
    return None


def column_blocks(columns: torch.Tensor) -> torch.Tensor:
    """columns [N, F] as ``score_product`` takes them: [ceil(N / 64), F, 64], filled up with zeros."""
    columns = F.pad(columns, (0, 0, 0, -columns.shape[0] % COLUMN_BLOCK))
    return columns.view(-1, COLUMN_BLOCK, columns.shape[1]).transpose(1, 2).contiguous()


class ExactFp32:
    """Context in which fp32 products are fp32: no TF32, no bf16 passes, no autocast (``with ExactFp32("cuda"): ...``).

    torch lets a process trade fp32 products for faster, coarser ones (``set_float32_matmul_precision``, ``allow_tf32``,
    ``torch.autocast``); a router must not inherit that. In bf16 up to 3% of tokens get another adapter.
    """

    __slots__ = ("_autocast", "_device_type", "_matmul", "_precision")

    def __init__(self, device_type: str):
        self._device_type = device_type
        backend: Any = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
        self._matmul = backend.matmul

    def __enter__(self) -> None:
        self._precision = self._matmul.fp32_precision
        if self._precision not in ("none", "ieee"):
            self._matmul.fp32_precision = "ieee"
        self._autocast: Any = None
        if torch.is_autocast_enabled(self._device_type):
            self._autocast = torch.autocast(self._device_type, enabled=False)
            self._autocast.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._autocast is not None:
            self._autocast.__exit__(kind, error, trace)
        if self._precision not in ("none", "ieee"):
            self._matmul.fp32_precision = self._precision
