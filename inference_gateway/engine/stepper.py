"""What the engine and the worker of transformers tell each other about a step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from seqr.step import BaseOnly, StepContext


@dataclass(frozen=True)
class Slice:
    """One sequence's tokens in a step: where they begin, how many, and whether the last one predicts a token."""

    request_id: str
    position: int
    length: int
    predicts: bool


@dataclass(frozen=True)
class Batch:
    """One step: the slices in the order of the flat batch, which is ``tokens`` long (padding comes last)."""

    slices: tuple[Slice, ...]
    tokens: int


@dataclass(frozen=True)
class Output:
    """What a request has so far: all its generated tokens, and whether and how it ended."""

    request_id: str
    generated: Sequence[int]
    finished: bool
    error: str | None


class Stepper(Protocol):
    """The engine as the worker's thread calls it. None of this may raise."""

    def begin(self, batch: Batch) -> StepContext | BaseOnly | None:
        """What routed layers are to read; None where they read a step of ``seqr.kernels``, which is set by then."""
        ...

    def pick(self, request_ids: Sequence[str], logits: torch.Tensor) -> None:
        """Leave in each row of ``logits`` [n, V] fp32 what its argmax is to choose."""
        ...

    def prefix_chain(self, request_id: str) -> tuple[list[bytes], int] | None:
        """The root of a request's block names, followed by the names so far; and how many tokens may be found in the
        cache. None if it shares nothing."""
        ...

    def completed(self) -> None: ...

    def failed(self, error: Exception) -> None: ...

    def deliver(self, outputs: Sequence[Output]) -> None: ...
