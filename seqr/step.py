"""What the routed layers need to know about one forward pass: set before it, read by each layer, finished after it.

Layers know nothing of users or requests. A step is a flat batch of T tokens: one segment per sequence, then padding.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from seqr.errors import SeqrError
from seqr.frame import NO_FRAME, Frame
from seqr.library import Library, PermissionRows
from seqr.routing import per_token
from seqr.routing.evidence import GRID, EvidencePass, EvidenceState, Spans, Standing, recency
from seqr.routing.groups import Groups
from seqr.routing.margins import lead, mean_leads
from seqr.routing.per_token import Gate
from seqr.routing.scores import choose, scores, usable

MODES = ("prompt_evidence", "evidence", "per_token")


class StepMissing(SeqrError):
    """A routed layer ran without a step: nobody said who may use what, so it does not run at all."""

    code = "step_missing"


class StepMismatch(SeqrError):
    """A step that does not describe the forward pass that read it."""

    code = "step_mismatch"


@dataclass(frozen=True)
class Segment:
    """A run of ``length`` consecutive tokens of one sequence in the flat batch.

    row: its permission row (0 = nobody); position: the first token's position in its sequence; frame: its positions
    that are no evidence; mode: one of ``MODES``. "per_token" is the paper's; "evidence" gathers while it goes and needs
    a slot where its evidence lives; "prompt_evidence" needs what its prompt said, in a pass of its own: ``standing``.
    recent: in such a pass, of mode "evidence", the position after the prompt's last word; the words before it weigh by
    ``recency``. None: all weigh the same.
    """

    row: int
    position: int
    length: int
    slot: int = -1
    mode: str = "evidence"
    frame: Frame = NO_FRAME
    standing: Standing | None = None
    recent: int | None = None


class StepContext:
    """One forward pass over ``tokens`` tokens: ``segments`` in order, the rest (at the end) padding with row 0.

    ``evidence`` is needed when a segment's mode is evidence. exact: decide per-token choices in fp64 where fp32 cannot;
    by default on CPUs, where looking at a flag does not stall a device. watched: tokens of the flat batch, by index,
    whose ``margins`` are wanted. Raises ``StepMismatch`` or ``EvidenceStale``, before any state is touched. A step
    serves one forward pass; ``finish`` it afterwards, or free its slots when the pass failed.
    """

    def __init__(
        self,
        rows: PermissionRows,
        segments: Sequence[Segment],
        evidence: EvidenceState | None = None,
        tokens: int | None = None,
        exact: bool | None = None,
        watched: Sequence[int] = (),
    ):
        used = sum(segment.length for segment in segments)
        self.library = rows.library
        self.segments = tuple(segments)
        self.tokens = used if tokens is None else tokens
        self.choices: list[torch.Tensor] = []
        self._grouped_columns: list[int] = []
        self._groups: Groups | None = None
        _check(self.library, self.segments, self.tokens, evidence)
        device = self.library.device
        with torch.inference_mode(False):
            padding = self.tokens - used
            lengths = torch.tensor([*(segment.length for segment in segments), padding])
            token_rows = torch.tensor([*(segment.row for segment in segments), 0]).repeat_interleave(lengths)
            self.permitted = rows.table.index_select(0, token_rows.to(device))
            self._modes = {segment.mode for segment in segments}
            self._settled_column: torch.Tensor | None = None
            if "prompt_evidence" in self._modes:
                self._settled_column = _settle(rows, segments, lengths.to(device))
            if len(self._modes) > 1:
                self._gathers = _token_flags([s.mode == "evidence" for s in segments], lengths, device)
                self._settled = _token_flags([s.mode == "prompt_evidence" for s in segments], lengths, device)
            self._exact = device.type == "cpu" if exact is None else exact
            self._seen = bytearray(len(self.library.stacks))
            self._evidence = evidence
            self._slots = [segment.slot for segment in segments if segment.mode == "evidence"]
            self._pass = None
            if evidence is not None and self._slots:
                for segment in segments:
                    if segment.mode == "evidence":
                        evidence.begin(segment.slot, segment.position, segment.length)
                begun = _begun(segments, padding)
                if not bool(begun.all()):
                    self.permitted = self.permitted & begun[:, None].to(device)
                self._pass = EvidencePass(evidence, _spans(segments, padding, evidence.slots, device))
        # Evidence is gathered for a sequence that nobody may shape, too: its permitted set may grow while it runs, and
        # what it has gathered by then must not depend on who else was in the batch.
        self.idle = not self.library.silos or (self._pass is None and not bool(self.permitted.any()))
        # Nor does a pass that only reads look at its choices: on a GPU each look would wait for the device.
        self.adds_nothing = all(segment.row == 0 for segment in segments)
        self._gate = Gate(self.permitted)
        self._watches = _watches(segments, watched, device)
        self._watched = tuple(watched)
        self._leads: dict[str, list[torch.Tensor]] = {watch.mode: [] for watch in self._watches}

    def choose(self, module: int, z: torch.Tensor) -> torch.Tensor:
        """The column for each token at module ``module`` (its index in the plan): z [T, r] fp32 -> int64 [T], or -1."""
        return self.choose_together(module, z[None])[0]

    def choose_together(self, module: int, z: torch.Tensor) -> Sequence[torch.Tensor]:
        """``choose`` at the K modules from ``module`` on, in turn: z fp32 [K, T, r], contiguous -> K of int64 [T]."""
        passed = range(module, module + z.shape[0])
        if self._watches and len(passed) > 1:
            # A lead is seen only before the next module adds to the evidence.
            return [self.choose(one, its) for one, its in zip(passed, z, strict=True)]
        for one in passed:
            if self._seen[one]:
                raise StepMismatch(
                    f"module {one} was already passed in this step: every forward pass needs its own step"
                )
            self._seen[one] = 1
        if self._settled_column is not None and self._modes == {"prompt_evidence"}:
            columns: Sequence[torch.Tensor] = [self._settled_column] * len(passed)
        else:
            columns = self._by_score(module, z).unbind()
        self.choices += columns
        for watch in self._watches:
            self._leads[watch.mode].append(self._lead(watch, module, z[0], columns[0].index_select(0, watch.tokens)))
        return columns

    def _by_score(self, module: int, z: torch.Tensor) -> torch.Tensor:
        if self._pass is None:
            column = self._per_token(module, z)
        else:
            modules = self.library.together(module, z.shape[0], exact=False)
            column = self._pass.route_together(module, z, modules, self._gate)
            if "per_token" in self._modes:
                column = torch.where(self._gathers, column, self._per_token(module, z))
        if self._settled_column is None:
            return column
        return torch.where(self._settled, self._settled_column, column)

    def _per_token(self, module: int, z: torch.Tensor) -> torch.Tensor:
        modules = self.library.together(module, z.shape[0], self._exact)
        return per_token.route_together(z, modules, self._gate)

    def _lead(self, watch: "_Watch", module: int, z: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        stack = self.library.stacks[module]
        permitted = self.permitted.index_select(0, watch.tokens)
        if watch.mode == "evidence" and self._pass is not None:
            value = self._pass.value_at(watch.tokens) * watch.scale
            return lead(value, permitted & ~stack.offset.isnan(), column)
        score = scores(z.index_select(0, watch.tokens), stack.gram, stack.offset)
        return lead(score, permitted & usable(score), column)

    def grouped(self, column: torch.Tensor) -> Groups:
        """The choices of ``choose`` [T] as groups; the last module's are kept, as the next often repeats them."""
        columns = column.tolist()
        if self._groups is None or columns != self._grouped_columns:
            self._grouped_columns, self._groups = columns, Groups.of(columns, column.device)
        return self._groups

    def finish(self) -> None:
        """Close the step after its forward pass, so that its sequences can go on."""
        if self._evidence is not None:
            self._evidence.finish(self._slots)

    def choice_counts(self, tokens: Sequence[int]) -> torch.Tensor:
        """Attribution: int64 [T, N] on the CPU, how many modules chose each column for each of ``tokens``."""
        counts = torch.zeros(len(tokens), self.library.width + 1, dtype=torch.int64)
        if self.choices:
            chosen = torch.stack(self.choices, dim=1)
            chosen = chosen.index_select(0, torch.tensor(tokens, dtype=torch.int64, device=chosen.device)).cpu() + 1
            counts.scatter_add_(1, chosen, torch.ones_like(chosen))
        return counts[:, 1:]

    def margins(self) -> list[float | None]:
        """For each watched token how far the choice lay above the next permitted one, mean over the modules.

        In the units of its mode: per_token the score's, evidence the value's (``seqr.routing.evidence``). None where
        there was nothing to choose between, and for prompt_evidence, whose choice was made before: ``standing_lead``.
        """
        found: dict[int, float | None] = {}
        for watch in self._watches:
            leads = self._leads[watch.mode]
            if leads:
                found.update(zip(watch.tokens.tolist(), mean_leads(leads), strict=True))
        return [found.get(token) for token in self._watched]


class BaseOnly:
    """The step of a forward pass that no adapter takes part in, of any shape."""


_current: ContextVar[StepContext | BaseOnly | None] = ContextVar("seqr_step", default=None)


def set_context(step: StepContext | BaseOnly | None) -> None:
    """Make ``step`` the one that routed layers read in this thread or task."""
    _current.set(step)


def get_context() -> StepContext | BaseOnly:
    """The current step; raises ``StepMissing``."""
    step = _current.get()
    if step is None:
        raise StepMissing("a routed layer ran without a step context: set one before the forward pass")
    return step


def reset_context() -> None:
    """Leave no step set: the next forward pass must bring its own."""
    _current.set(None)


@contextmanager
def running(step: StepContext) -> Iterator[StepContext]:
    """``step`` around one forward pass: finished when the pass succeeds, and unset in any case."""
    set_context(step)
    try:
        yield step
        step.finish()
    finally:
        reset_context()


@contextmanager
def base_only() -> Iterator[None]:
    """Forward passes of the base model alone through routed layers, as calibration needs them."""
    previous = _current.get()
    set_context(BaseOnly())
    try:
        yield
    finally:
        set_context(previous)


def _check(library: Library, segments: Sequence[Segment], tokens: int, evidence: EvidenceState | None) -> None:
    used = sum(segment.length for segment in segments)
    if tokens < used or tokens == 0 or any(s.length < 1 or s.position < 0 for s in segments):
        raise StepMismatch(f"a step of {tokens} tokens cannot hold segments of {[s.length for s in segments]} tokens")
    if any(segment.mode not in MODES for segment in segments):
        raise StepMismatch(f"a segment's mode must be one of {', '.join(MODES)}")
    if any(segment.mode == "prompt_evidence" and segment.standing is None for segment in segments):
        raise StepMismatch("prompt_evidence needs what the prompt has said: read it in a step of mode evidence first")
    slots = [segment.slot for segment in segments if segment.mode == "evidence"]
    if not slots:
        return
    if evidence is None:
        raise StepMismatch("evidence routing needs an evidence state")
    if len(set(slots)) != len(slots):
        raise StepMismatch("two segments of one step share an evidence slot")
    if evidence.columns != library.columns or evidence.sums.shape[2] != library.width:
        raise StepMismatch("the evidence state belongs to another library: remap it when the library changes")
    for segment in segments:
        if segment.mode == "evidence":
            evidence.check(segment.slot, segment.position)


def _token_flags(flags: Sequence[bool], lengths: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A flag per segment -> bool [T]; False for padding, where nobody is permitted anyway."""
    return torch.tensor([*flags, False]).repeat_interleave(lengths).to(device)


@dataclass(frozen=True)
class _Watch:
    """The watched tokens of one mode: int64 [A]; scale fp64 [A, 1] turns evidence sums into means of the score."""

    mode: str
    tokens: torch.Tensor
    scale: torch.Tensor


def _watches(segments: Sequence[Segment], watched: Sequence[int], device: torch.device) -> tuple[_Watch, ...]:
    """The watched tokens whose choice this pass makes, by mode."""
    found: dict[str, list[tuple[int, float]]] = {"evidence": [], "per_token": []}
    starts = [0]
    for segment in segments:
        starts.append(starts[-1] + segment.length)
    for token in watched:
        index = bisect_right(starts, token) - 1
        if token < 0 or index >= len(segments):
            raise StepMismatch(f"token {token} is in no segment of the step, so it cannot be watched")
        segment = segments[index]
        spoken = segment.frame.spoken(segment.position + token - starts[index] + 1)
        if segment.mode in found:
            found[segment.mode].append((token, 1.0 / (GRID * max(1, spoken))))
    return tuple(
        _Watch(
            mode,
            torch.tensor([token for token, _ in tokens], device=device),
            torch.tensor([[scale] for _, scale in tokens], dtype=torch.float64, device=device),
        )
        for mode, tokens in found.items()
        if tokens
    )


def standing_lead(rows: PermissionRows, row: int, standing: Standing) -> tuple[str | None, float | None]:
    """The silo that ``standing`` settles on under a permission row, and its lead over the next in units of 2^-20.

    (None, None) where nobody may answer; no lead where nobody else may.
    """
    value, allowed = _standings(rows, [(row, standing)])
    column = choose(value, allowed)
    ahead = float(lead(value, allowed, column)[0])
    winner = int(column[0])
    return (None if winner < 0 else rows.library.silos[winner]), (None if math.isnan(ahead) else ahead)


def _standings(
    rows: PermissionRows, standings: Sequence[tuple[int, Standing | None]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(row, standing) of S sequences -> their evidence fp64 [S, N] and which columns may be chosen, bool [S, N]."""
    library = rows.library
    nothing = torch.zeros(library.width, dtype=torch.float64)
    value = torch.stack([nothing if s is None else s.row(library.columns, library.width) for _, s in standings]).to(
        library.device
    )
    row = torch.tensor([row if s is not None else 0 for row, s in standings], device=library.device)
    return value, rows.table.index_select(0, row) & library.finite


def _settle(rows: PermissionRows, segments: Sequence[Segment], lengths: torch.Tensor) -> torch.Tensor:
    """The one column of every token of the segments that have a standing: int64 [T], -1 for nobody and elsewhere."""
    value, allowed = _standings(rows, [*((s.row, s.standing) for s in segments), (0, None)])
    return choose(value, allowed).repeat_interleave(lengths)


def _begun(segments: Sequence[Segment], padding: int) -> torch.Tensor:
    """bool [T]: False where a sequence that gathers evidence while it goes has none yet."""
    flags: list[bool] = []
    for s in segments:
        head = max(1, s.frame.head) if s.mode == "evidence" else 0
        silent = min(s.length, max(0, head - s.position))
        flags += [False] * silent + [True] * (s.length - silent)
    return torch.tensor(flags + [True] * padding)


def _spans(segments: Sequence[Segment], padding: int, slots: int, device: torch.device) -> Spans:
    """Padding, and segments that are routed one by one, are runs of the spare slot that add nothing to it."""
    # All words weigh the same where the last one lies before them all.
    runs = [(s.slot if s.mode == "evidence" else slots, s.position, s.length, s.frame, s.recent or 0) for s in segments]
    if padding:
        runs.append((slots, 0, padding, NO_FRAME, 0))
    slot, position, length, head, pause, resume, recent = (
        torch.tensor(column)
        for column in zip(
            *((s, p, n, max(1, f.head), f.tail.start, f.tail.stop, r) for s, p, n, f, r in runs), strict=True
        )
    )
    last = length.cumsum(0) - 1
    first = last - length + 1
    run_of = torch.arange(len(runs)).repeat_interleave(length)
    positions = torch.arange(run_of.shape[0]) - first[run_of] + position[run_of]
    counts = (positions >= head[run_of]) & (slot[run_of] != slots)
    counts &= (positions < pause[run_of]) | (positions >= resume[run_of])
    weights = recency(recent[run_of] - 1 - positions) * counts
    return Spans(*(t.to(device) for t in (slot, first, last, run_of, weights)))
