"""Accumulated evidence: which adapter this sequence has spoken for so far (decisions 7 and 13).

At module l and position t of a sequence

    value_i(l, t) = sum over modules k <= l passed in this forward of  mean over positions 1..t of s_i(k, .)
    choice(l, t)  = argmax of value_i(l, t) over the permitted set

where s is the score clipped to [-6, 6]. Position 0 is an attention sink and a chat's frame is the same for everybody:
they contribute nothing, and where there is no evidence yet nobody is chosen. A score that is not finite counts as -6
and cannot be chosen at that module and token.

That is "evidence", in one pass: what is chosen early changes the hidden states that later evidence is read from. In
"prompt_evidence" the base model reads the whole prompt first, on the hidden states that the adapters were calibrated
on, and the sum over all modules and all of the prompt's tokens decides for the sequence (``Standing``). There a word
counts half as much as the word 6 places after it (``recency``): the last ones have seen the most of the prompt.

All the means of one token have the same divisor t, so the sums are compared instead: the same choice.

Exactness: every s is rounded to a multiple of 2^-20 and the sums are kept in fp64, in these units. They are whole
numbers, below 2^53 up to some millions of tokens (2^53 / (6 * 2^20 * modules)), so the sums have no rounding error and
their order does not matter: given the scores, one-shot prefill, any chunking and token-by-token decode give the same
bits on every device.
"""

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from seqr.errors import SeqrError
from seqr.routing.optional import compiled
from seqr.routing.per_token import Columns as Adapters
from seqr.routing.per_token import Gate, Together
from seqr.routing.scores import CLIP, choose, constant, scores, usable

GRID = float(1 << 20)
HALF_LIFE = 6  # words
FORGOTTEN = 180  # words; 2^-30 of a score of 6 is less than half a unit


class EvidenceStale(SeqrError):
    """A step that does not continue its sequences: a gap in positions, an unfinished step, or another library."""

    code = "evidence_stale"


Columns = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Standing:
    """What a whole prompt has said for each adapter: (silo id, revision) -> its evidence in units of 2^-20."""

    units: Mapping[tuple[str, int], float]
    _last: list[tuple[Columns, torch.Tensor]] = field(default_factory=list, init=False, repr=False, compare=False)

    def row(self, columns: Columns, width: int) -> torch.Tensor:
        """The evidence by column, fp64 [width] on the CPU; 0 for an adapter that joined since, as for a padding column.

        Kept until it is asked for other columns: a sequence asks in every step, and a library changes seldom.
        """
        for known, row in self._last:
            if known is columns and row.shape[0] == width:
                return row
        units = [self.units.get(column, 0.0) for column in columns] + [0.0] * (width - len(columns))
        with torch.inference_mode(False):
            row = torch.tensor(units, dtype=torch.float64, device="cpu")
        self._last[:] = [(columns, row)]
        return row


@lru_cache(maxsize=1)
def _decay() -> torch.Tensor:
    roots = [2.0 ** (-part / HALF_LIFE) for part in range(HALF_LIFE)]
    weights = [math.ldexp(roots[d % HALF_LIFE], -(d // HALF_LIFE)) for d in range(FORGOTTEN)]
    with torch.inference_mode(False):
        return torch.tensor([*weights, 0.0], dtype=torch.float32, device="cpu")


def recency(distance: torch.Tensor) -> torch.Tensor:
    """2^(-d / 6), the weight of a word d places before a prompt's last: int64 [T] -> fp32 [T].

    0 from d = 180 on, where nothing is left of any score. The last word and whatever follows it weigh 1.
    """
    return _decay().to(distance.device)[distance.clamp(0, FORGOTTEN)]


def total_recency(words: int) -> float:
    """The sum of the weights of a prompt's words."""
    return float(_decay()[:words].to(torch.float64).sum())


class EvidenceState:
    """The running sums of every sequence, by slot: what a sequence's KV cache is to attention, this is to routing.

    sums [modules, slots + 1, N] fp64 in units of 2^-20; the last slot belongs to padding and stays zero. ``columns``
    are the (silo id, revision) whose evidence the columns hold.
    """

    def __init__(self, modules: int, slots: int, columns: Columns, width: int, device: torch.device | str = "cpu"):
        self.slots = slots
        self.columns = columns
        with torch.inference_mode(False):
            self.sums = torch.zeros(modules, slots + 1, width, dtype=torch.float64, device=device)
        self._next_position = [0] * slots
        self._open: set[int] = set()

    def standing(self, slot: int, adapters: Set[tuple[str, int]]) -> Standing:
        """What the sequence in ``slot`` has said so far for each of ``adapters`` (silo id, revision), over all modules.

        Those that a sequence may not use are left out: what leaves the library must leave nothing behind in others.
        """
        totals = zip(self.columns, self.sums[:, slot].sum(0).tolist(), strict=False)
        return Standing({column: total for column, total in totals if column in adapters})

    def free(self, slot: int) -> None:
        """Forget the sequence in ``slot``; the next one there begins at position 0."""
        self.sums[:, slot].zero_()
        self._next_position[slot] = 0
        self._open.discard(slot)

    def begin_at(self, slot: int, position: int) -> None:
        """Begin a new sequence whose tokens before ``position`` are no evidence and need not be computed."""
        self.free(slot)
        self._next_position[slot] = position

    def remap(self, columns: Columns, width: int) -> None:
        """Follow the library to its new columns: what a (silo, revision) has gathered goes with it.

        A new silo, or a new revision of one, begins at zero, the score of an average text. What a removed one had
        gathered is destroyed.
        """
        if columns == self.columns and width == self.sums.shape[2]:
            return
        with torch.inference_mode(False):
            moved = self.sums.new_zeros(self.sums.shape[0], self.sums.shape[1], width)
            old = {column: index for index, column in enumerate(self.columns)}
            kept = [(old[column], new) for new, column in enumerate(columns) if column in old]
            if kept:
                source, target = (torch.tensor(side, device=self.sums.device) for side in zip(*kept, strict=True))
                moved.index_copy_(2, target, self.sums.index_select(2, source))
            self.sums.zero_()
            self.sums, self.columns = moved, columns

    def check(self, slot: int, position: int) -> None:
        """Whether ``position`` may come next in ``slot`` (0 always may: it begins a new sequence).

        Raises ``EvidenceStale``.
        """
        if not 0 <= slot < self.slots:
            raise EvidenceStale(f"slot {slot} does not exist: this state has slots 0 to {self.slots - 1}")
        if position == 0:
            return
        if slot in self._open:
            raise EvidenceStale(f"slot {slot} is in a step that was never finished: free it and begin at position 0")
        if position != self._next_position[slot]:
            raise EvidenceStale(
                f"slot {slot} has seen positions below {self._next_position[slot]}, but the step begins at {position}: "
                "free it and begin at position 0"
            )

    def begin(self, slot: int, position: int, length: int) -> None:
        """Open ``length`` tokens from ``position`` on, which ``check`` allowed; position 0 forgets what was there."""
        if position == 0:
            self.free(slot)
        self._open.add(slot)
        self._next_position[slot] = position + length

    def finish(self, slots: Sequence[int]) -> None:
        """Close what ``begin`` opened, after the forward pass."""
        self._open.difference_update(slots)


@dataclass
class Spans:
    """The sequences of one flat batch of T tokens, as S runs that cover it without gaps.

    slots, first, last int64 [S]: each run's slot and its first and last token; run_of int64 [T]; weights fp32 [T]: how
    much each token counts, 0 for silent positions (``seqr.frame.Frame``), for padding and for tokens that gather no
    evidence, at most 1.
    """

    slots: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    run_of: torch.Tensor
    weights: torch.Tensor


class EvidencePass:
    """One forward pass over a flat batch: carries the sum over the modules passed so far."""

    def __init__(self, state: EvidenceState, spans: Spans):
        self._state = state
        self._spans = spans
        self._one_each = spans.slots.shape[0] == spans.run_of.shape[0]
        weights = spans.weights.to(state.sums.device)
        grid = constant(GRID, torch.float32, state.sums.device)
        # A power of two times a weight is exact, so a score is rounded once, whatever its weight.
        self._unit_of = weights * grid
        self._units = grid if bool((weights == 1.0).all()) else self._unit_of[:, None]
        self._value = state.sums.new_zeros(spans.run_of.shape[0], state.sums.shape[2])

    def value(self, module: int, score: torch.Tensor) -> torch.Tensor:
        """Take in a module's score [T, N]; returns t value(l, t) in units of 2^-20, [T, N] fp64, until the next."""
        units = score.nan_to_num(-CLIP, -CLIP, -CLIP).clamp_(-CLIP, CLIP).mul_(self._units).round_()
        return self._value.add_(self._prefix(self._state.sums[module], units))

    def route(self, module: int, score: torch.Tensor, permitted: torch.Tensor) -> torch.Tensor:
        """The choice at module ``module``: score [T, N] fp32, permitted [T, N] bool -> int64 [T], -1 for nobody."""
        return choose(self.value(module, score), permitted & usable(score))

    def route_activations(self, module: int, z: torch.Tensor, columns: Adapters, gate: Gate) -> torch.Tensor:
        """``route`` of the scores of z fp32 [T, r]. Call inside ``ExactFp32``."""
        return self.route_together(module, z[None], Together((columns,)), gate)[0]

    def route_together(self, module: int, z: torch.Tensor, modules: Together, gate: Gate) -> torch.Tensor:
        """``route_activations`` of K modules from ``module`` on, in turn: z fp32 [K, T, r], contiguous -> int64 [K, T].

        Call inside ``ExactFp32``.
        """
        if compiled is None or z.device.type != "cpu":
            return torch.stack(
                [
                    self.route(module + place, scores(its, columns.gram, columns.offset), gate.permitted)
                    for place, (its, columns) in enumerate(zip(z, modules.columns, strict=True))
                ]
            )
        column = np.empty(z.shape[:2], np.int64)
        product = compiled.score_product(z, modules.grams, gate.feature_rows(z.shape[0], z.shape[2]))
        slots, first, last, units, value = self._arrays
        sums = self._state.sums[module : module + z.shape[0]].numpy()
        compiled.gather_evidence(
            product, modules.shifts, units, slots, first, last, gate.rows, gate.somebody, sums, value, column
        )
        return torch.from_numpy(column)

    @cached_property
    def _arrays(self) -> tuple[npt.NDArray[Any], ...]:
        spans = self._spans
        return tuple(t.numpy() for t in (spans.slots, spans.first, spans.last, self._unit_of, self._value))

    def value_at(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the last module passed has made of t value(l, t), for tokens int64 [A] -> fp64 [A, N], a copy."""
        return self._value.index_select(0, tokens)

    def _prefix(self, sums: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
        """Each token's sum since its sequence began; leaves the last one in ``sums`` [slots + 1, N]."""
        spans = self._spans
        carried = sums.index_select(0, spans.slots)
        if self._one_each:
            prefix = carried.add_(units)
            sums.index_copy_(0, spans.slots, prefix)
            return prefix
        # One running sum over the whole batch, less what the runs before this one added: exact, see above.
        running = units.cumsum(0, dtype=torch.float64)
        before = running.index_select(0, spans.first).sub_(units.index_select(0, spans.first))
        prefix = running.add_(carried.sub_(before).index_select(0, spans.run_of))
        sums.index_copy_(0, spans.slots, prefix.index_select(0, spans.last))
        return prefix
