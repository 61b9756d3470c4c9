"""The running requests as the engine's thread sees them: which adapters, which evidence slot, how far."""

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

from inference_gateway.engine.base import AdapterKey, Event, Failed, GenerationRequest, Shares, Tokens, TokenShares
from inference_gateway.engine.sampling import Sampler
from seqr.routing.evidence import FORGOTTEN, Standing

# What the id of the pass that reads a prompt ends with.
READING = "/reading"


@dataclass
class Running:
    """One request. ``deliver`` hands an event to whoever asked, from any thread, and never blocks.

    ``ends``: the tokens that end its answer. ``reading``: the base model reads its prompt and gathers the evidence that
    becomes ``standing``; the answer begins after that. Both passes are requests of their own to transformers, by
    ``pass_id``. ``margin``: by how much the prompt spoke for its winner, see ``TokenShares``. ``token_shares``: those
    of tokens not yet handed out. ``chain``: the root of its cache blocks' names and the names, while it may share them,
    under ``library_version``.
    """

    request: GenerationRequest
    deliver: Callable[[Event], None]
    sampler: Sampler | None
    ends: frozenset[int] = frozenset()
    slot: int | None = None
    generated: int = 0
    ended: bool = False
    reading: bool = False
    standing: Standing | None = None
    margin: float | None = None
    chain: list[bytes] = field(default_factory=list)
    library_version: int = -1
    next_position: int = 0
    failed: bool = False
    last_token: int | None = None
    counts: dict[str, int] = field(default_factory=dict)
    answer_counts: dict[str, int] = field(default_factory=dict)
    choices: int = 0
    answer_choices: int = 0
    token_shares: list[TokenShares] = field(default_factory=list)
    _within: frozenset[AdapterKey] | None = field(default=None, init=False, repr=False)

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def pass_id(self) -> str:
        return self.request.request_id + (READING if self.reading else "")

    @cached_property
    def silos(self) -> frozenset[str]:
        return frozenset(key.silo_id for key in self.request.adapters)

    @cached_property
    def words_end(self) -> int:
        """The position after the prompt's last word: where the frame's end begins, or the prompt's own end."""
        tail = self.request.frame.tail
        return tail.start if tail else len(self.request.prompt)

    @cached_property
    def silent(self) -> int:
        """How many of the prompt's first tokens are no evidence in the pass that reads it."""
        return max(1, self.request.frame.head, self.words_end - FORGOTTEN)

    def within(self, keys: frozenset[AdapterKey]) -> bool:
        """Whether all adapters of the request are among ``keys``, which is compared once: there may be a thousand."""
        if self._within is not keys:
            if not self.request.adapters <= keys:
                return False
            self._within = keys
        return True

    @property
    def shares(self) -> Shares | None:
        if not self.request.attribution:
            return None
        return Shares(dict(self.counts), dict(self.answer_counts), self.choices, self.answer_choices)


class SequenceTable:
    """Requests by id, and the evidence slots they hold. An ended request takes no step and hands out no token.

    A slot is taken when a sequence is first in a batch and given back between steps only, so that no running forward
    pass ever writes into a slot that belongs to somebody else by then.
    """

    def __init__(self, slots: int):
        self._lock = threading.Lock()
        self._sequences: dict[str, Running] = {}
        self._free = list(range(slots - 1, -1, -1))
        self._released: list[int] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Running]:
        with self._lock:
            return iter(list(self._sequences.values()))

    def add(self, sequence: Running) -> None:
        with self._lock:
            if sequence.request_id in self._sequences:
                raise ValueError(f"request id {sequence.request_id} is in use")
            self._sequences[sequence.request_id] = sequence

    def get(self, pass_id: str) -> Running | None:
        """The sequence whose current pass has this id."""
        with self._lock:
            sequence = self._sequences.get(pass_id.removesuffix(READING))
            return sequence if sequence is not None and sequence.pass_id == pass_id else None

    def slot_of(self, sequence: Running) -> int | None:
        """The evidence slot of a sequence, taken now if it has none; None when it has ended or all are in use."""
        with self._lock:
            if sequence.slot is None and self._free and not sequence.ended:
                sequence.slot = self._free.pop()
            return sequence.slot

    def reclaim(self) -> list[int]:
        """Between steps: the slots of sequences that have ended, free again and to be wiped by the caller."""
        with self._lock:
            released, self._released = self._released, []
            self._free.extend(released)
            return released

    def has_read(self, sequence: Running, standing: Standing) -> None:
        """End the pass that read the prompt: its slot is free, and nothing that still comes of it counts."""
        with self._lock:
            sequence.reading, sequence.standing, sequence.next_position = False, standing, 0
            if sequence.slot is not None:
                self._released.append(sequence.slot)
                sequence.slot = None

    def end(self, request_id: str, event: Event | None) -> Running | None:
        """End a request, telling its asker ``event`` if given; None if it had ended before. Tokens cannot follow."""
        with self._lock:
            sequence = self._sequences.pop(request_id, None)
            if sequence is None:
                return None
            sequence.ended, sequence.failed = True, isinstance(event, Failed)
            if sequence.slot is not None:
                self._released.append(sequence.slot)
                sequence.slot = None
            if event is not None:
                sequence.deliver(event)
            return sequence

    def hand_out(self, request_id: str, tokens: Iterable[int]) -> None:
        """Give new tokens to the asker, unless the request has ended."""
        with self._lock:
            sequence = self._sequences.get(request_id)
            ids = tuple(tokens)
            if sequence is None or not ids:
                return
            sequence.generated += len(ids)
            sequence.last_token = ids[-1]
            logprobs = sequence.sampler.take(len(ids)) if sequence.sampler is not None else ()
            shares = tuple(sequence.token_shares[: len(ids)])
            del sequence.token_shares[: len(ids)]
            sequence.deliver(Tokens(ids, logprobs, shares, sequence.shares))
