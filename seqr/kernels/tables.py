"""The adapters of one site as the kernels read them. A site: the M modules that read the same x, such as q, k and v."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from seqr.errors import SeqrError
from seqr.kernels.numbers import ADAPTER_BLOCK
from seqr.kernels.project import split_bf16
from seqr.routing.features import feature_count

if TYPE_CHECKING:
    from seqr.library import ModuleStack


class SiteMismatch(SeqrError):
    """Modules that cannot be routed in one launch, or tensors that are not theirs."""

    code = "site_mismatch"


@dataclass(frozen=True)
class SiteTables:
    """N adapters (a multiple of 64, the last ones padding) of M modules of rank r, side by side.

    gram_terms bf16 [M, N / 64, 3, F', 64]: the gram [M, N / 64, F, 64] of ``seqr.library.ModuleStack``, with F =
    r (r + 1) / 2, as the sum of three bf16 numbers, exact as in ``split_bf16``, and rows of 0 from F on (``steps``);
    offset fp32 [M, N]; b_t [K, r, m] bf16 or fp32 with K <= N adapters and m the modules' outputs side by side. blocks
    int32 [3, B]: module, first column and end of each block of the outputs; span int32 [2, M]: the first block of each
    module and how many it has; spans int32 [3, B'] as blocks, wider.
    """

    rank: int
    outputs: tuple[int, ...]
    gram_terms: torch.Tensor
    offset: torch.Tensor
    b_t: torch.Tensor
    blocks: torch.Tensor
    span: torch.Tensor
    spans: torch.Tensor

    BLOCK = 256
    WIDE = 1024

    @classmethod
    def of(cls, gram: torch.Tensor, offset: torch.Tensor, b_t: torch.Tensor, outputs: Sequence[int]) -> "SiteTables":
        """Check the shapes of ``gram``, ``offset`` and ``b_t`` (see the class) and complete them. ``SiteMismatch``."""
        modules, blocks, features, wide = gram.shape
        rank = b_t.shape[1]
        if wide != ADAPTER_BLOCK.value or features != feature_count(rank) or blocks == 0:
            raise SiteMismatch(f"gram must be [M, N / 64, {feature_count(rank)}, 64] for rank {rank}, got {gram.shape}")
        if modules != len(outputs) or offset.shape != (modules, blocks * wide) or b_t.shape[2] != sum(outputs):
            raise SiteMismatch(
                f"{len(outputs)} modules of {sum(outputs)} outputs do not fit gram {tuple(gram.shape)}, "
                f"offset {tuple(offset.shape)} and b_t {tuple(b_t.shape)}"
            )
        if gram.dtype != torch.float32 or offset.dtype != torch.float32:
            raise SiteMismatch("gram and offset must be fp32: coarser ones change decisions")
        terms = cls.terms_of(gram)
        if terms.numel() >= 1 << 31:
            raise SiteMismatch(
                f"a site's gram may hold 2^31 numbers as three terms, got {terms.numel()}: route its modules one by one"
            )
        cuts, span = (part.to(gram.device) for part in _cut(outputs, cls.BLOCK))
        spans = _cut(outputs, cls.WIDE)[0].to(gram.device)
        return cls(rank, tuple(outputs), terms, offset.contiguous(), b_t.contiguous(), cuts, span, spans)

    @classmethod
    def of_stacks(cls, stacks: Sequence["ModuleStack"], outputs: Sequence[int], dtype: torch.dtype) -> "SiteTables":
        """From a library's modules, with b_t rounded to ``dtype``; no adapter at all is one that is never permitted."""
        gram = torch.stack([stack.gram for stack in stacks])
        rank = next(r for r in range(1, 4096) if feature_count(r) >= gram.shape[2])
        if stacks[0].b_t:
            columns = [torch.cat(parts, dim=1) for parts in zip(*(stack.b_t for stack in stacks), strict=True)]
            b_t = torch.stack([column.to(dtype) for column in columns])
        else:
            b_t = gram.new_zeros(1, rank, sum(outputs), dtype=dtype)
        return cls.of(gram, torch.stack([stack.offset for stack in stacks]), b_t, outputs)

    @staticmethod
    def terms_of(gram: torch.Tensor) -> torch.Tensor:
        """gram fp32 [M, N / 64, F, 64] -> ``gram_terms``."""
        modules, blocks, features, wide = gram.shape
        terms = gram.new_zeros(modules, blocks, 3, padded_features(features), wide, dtype=torch.bfloat16)
        for module in range(modules):
            terms[module, :, :, :features] = split_bf16(gram[module]).transpose(0, 1)
        return terms

    @property
    def gram(self) -> torch.Tensor:
        """The terms added up: fp32 [M, N / 64, F, 64]."""
        high, middle, low = self.gram_terms[:, :, :, : feature_count(self.rank)].float().unbind(2)
        return high + (middle + low)

    @property
    def align(self) -> int:
        """What every module's first column and width is a multiple of, at most 16."""
        return math.gcd(16, *self.outputs)

    @property
    def modules(self) -> int:
        return len(self.outputs)

    @property
    def adapters(self) -> int:
        """N."""
        return self.offset.shape[1]

    def routing_bytes(self) -> int:
        """What must be on the device to choose; b_t may be elsewhere."""
        return 2 * self.gram_terms.numel() + 4 * self.offset.numel()


def steps(features: int) -> tuple[int, int, int]:
    """How a kernel goes through F features: (MAIN, STEPS, REST), STEPS products of MAIN rows and one of REST.

    By F only, as it decides the order of adding. Up to r = 16 in one step, as those features fit in registers and are
    made once per token; beyond, 32 at a time.
    """
    main = max(16, 1 << (features.bit_length() - 1))
    main = main if main <= 128 else 32
    count = max(1, features // main)
    return main, count, max(16, 1 << max(0, features - main * count - 1).bit_length())


def padded_features(features: int) -> int:
    """F': the rows of ``gram_terms``."""
    main, count, rest = steps(features)
    return main * count + rest


def _cut(outputs: Sequence[int], block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs in blocks of at most ``block`` columns, none across two modules: int32 [3, B], and their span."""
    rows: list[tuple[int, int, int]] = []
    spans: list[tuple[int, int]] = []
    start = 0
    for module, width in enumerate(outputs):
        first = len(rows)
        rows += [(module, at, min(at + block, start + width)) for at in range(start, start + width, block)]
        spans.append((first, len(rows) - first))
        start += width
    return _columns(rows), _columns(spans)


def _columns(rows: Sequence[tuple[int, ...]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32).T.contiguous()
