"""What a router is given and what it answers: the same for every method, so that they differ in nothing else."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from seqr.errors import SeqrError
from seqr.routers.pool import AdapterPool
from seqr.routing.products import ExactFp32
from seqr.routing.scores import choose


class RouterMisused(SeqrError):
    """A router that was given a pool or a batch it is not made for."""

    code = "router_misused"


@dataclass(frozen=True)
class Batch:
    """S sequences of L tokens, padded on the right, as T = S L flat tokens.

    lengths, prompts int64 [S]: how many tokens of each are real, and how many of these are its prompt; permitted bool
    [S, N]; texts: each prompt as text, for routers that read the query and not the hidden states.
    """

    width: int
    lengths: torch.Tensor
    prompts: torch.Tensor
    permitted: torch.Tensor
    texts: Sequence[str] = ()

    @classmethod
    def of(
        cls,
        sequences: Sequence[Sequence[int]],
        adapters: int,
        pad_token: int,
        prompts: Sequence[int] | None = None,
        texts: Sequence[str] = (),
        permitted: torch.Tensor | None = None,
    ) -> tuple["Batch", torch.Tensor]:
        """The batch of some token sequences and its ids int64 [S, L], padded on the right with ``pad_token``.

        prompts: the prompt's length in each, by default all of it; permitted bool [S, N], by default everything.
        """
        lengths = [len(tokens) for tokens in sequences]
        width = max(lengths)
        ids = torch.tensor([[*tokens, *[pad_token] * (width - len(tokens))] for tokens in sequences])
        if permitted is None:
            permitted = torch.ones(len(sequences), adapters, dtype=torch.bool)
        of_prompts = torch.tensor(lengths if prompts is None else prompts)
        return cls(width, torch.tensor(lengths), of_prompts, permitted, texts), ids

    @cached_property
    def sequence(self) -> torch.Tensor:
        """int64 [T]: the sequence of each token."""
        return torch.arange(self.lengths.shape[0]).repeat_interleave(self.width)

    @cached_property
    def position(self) -> torch.Tensor:
        """int64 [T]: each token's position in its sequence."""
        return torch.arange(self.width).repeat(self.lengths.shape[0])

    @cached_property
    def real(self) -> torch.Tensor:
        """bool [T]: False for padding."""
        return self.position < self.lengths[self.sequence]

    @cached_property
    def speaks(self) -> torch.Tensor:
        """bool [T]: the prompt's tokens after the first one, an attention sink that says nothing."""
        return (self.position > 0) & (self.position < self.prompts[self.sequence])

    @cached_property
    def allowed(self) -> torch.Tensor:
        """bool [T, N]: the adapters each token's user may use; none for padding."""
        return self.permitted[self.sequence] & self.real[:, None]


@dataclass(frozen=True)
class Mixture:
    """y = W x + sum over j of weights[t, j] B_i A_i x with i = columns[t, j]; column -1 adds nothing.

    columns int64 [T, k], weights fp32 [T, k].
    """

    columns: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of_one(cls, column: torch.Tensor) -> "Mixture":
        """One adapter for each token, or -1: column int64 [T]."""
        return cls(column[:, None], torch.ones(column.shape[0], 1))


class Activation:
    """The input of one module for one batch: x [T, n] and, computed once when first asked for, what A makes of it."""

    def __init__(self, pool: AdapterPool, module: int, x: torch.Tensor):
        self.pool = pool
        self.module = module
        self.x = x

    @cached_property
    def x32(self) -> torch.Tensor:
        """x in fp32."""
        return self.x.to(torch.float32)

    @cached_property
    def z(self) -> torch.Tensor:
        """A x in fp32: [T, r] for a shared A, [T, N, r] otherwise."""
        a = self.pool.a[self.module]
        with ExactFp32(self.x.device.type):
            if self.pool.shared:
                return self.x32 @ a.T
            return (self.x32 @ a.flatten(0, 1).T).view(-1, *a.shape[:2])


class Router(ABC):
    """Chooses, at every module of a forward pass, which adapters shape which token.

    ``begin`` opens a batch; ``route`` is then called once per module in forward order. A router whose ``reads`` is true
    is first shown the base model's own activations of the whole batch, one ``read`` per module.
    """

    name: str
    reads = False

    def __init__(self, pool: AdapterPool):
        self.pool = pool

    def begin(self, batch: Batch) -> None:
        """Forget the batch before and open this one."""
        self.batch = batch

    def read(self, activation: Activation) -> None:
        """Take in one module's activations of the base model; only called when ``reads``."""
        raise RouterMisused(f"router {self.name} does not read")

    def route(self, activation: Activation) -> Mixture:
        """The choice for every token of the batch at this module; nobody where the pool is empty."""
        if len(self.pool) == 0:
            return Mixture.of_one(torch.full((activation.x.shape[0],), -1))
        return self.mixture(activation)

    @abstractmethod
    def mixture(self, activation: Activation) -> Mixture:
        """``route`` with at least one adapter in the pool."""


class ScoreRouter(Router):
    """A router that gives every adapter a score at every token and takes the largest permitted one."""

    @abstractmethod
    def scores(self, activation: Activation) -> torch.Tensor:
        """fp32 [T, N]; a score that is not finite is never chosen."""

    def mixture(self, activation: Activation) -> Mixture:
        score = self.scores(activation)
        return Mixture.of_one(choose(score, self.batch.allowed & torch.isfinite(score)))
