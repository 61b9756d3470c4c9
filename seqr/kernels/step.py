"""What one forward pass needs on the device: fixed buffers, so that a captured graph serves the next step as well."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from seqr.errors import SeqrError
from seqr.kernels.candidates import Candidates
from seqr.kernels.evidence_decode import route_evidence
from seqr.kernels.evidence_prefill import Chunks, route_evidence_runs
from seqr.kernels.project import add_parts
from seqr.kernels.route import route_tokens
from seqr.kernels.tables import SiteTables

if TYPE_CHECKING:
    from seqr.step import Segment


class DeviceStepMissing(SeqrError):
    """A routed site ran without a step: nobody said who may use what, so it does not run at all."""

    code = "device_step_missing"


class DeviceStepMismatch(SeqrError):
    """A step that does not describe the forward pass that read it."""

    code = "device_step_mismatch"


@dataclass
class Batch:
    """T tokens as the kernels see them; every field keeps its address when the next step is copied in.

    row int32 [T]: the permission row, 0 (nobody) for padding and where a gathering sequence has no evidence yet; slot
    int32 [T]; counts int8 [T]: whether a token is evidence; gathers, settles bool [T]: which of the three modes it has;
    settled int32 [T]: the column of a token that settles.
    """

    row: torch.Tensor
    slot: torch.Tensor
    counts: torch.Tensor
    gathers: torch.Tensor
    settles: torch.Tensor
    settled: torch.Tensor

    @classmethod
    def of(
        cls, segments: Sequence["Segment"], settled: Sequence[int], tokens: int, spare: int, device: torch.device
    ) -> "Batch":
        """``segments`` in order, then padding; ``settled``: a column per segment, or -1; ``spare``: padding's slot."""
        row, slot, counts, gathers, settles, columns = ([*[0] * tokens] for _ in range(6))
        at = 0
        for segment, column in zip(segments, settled, strict=True):
            gathering, settling = segment.mode == "evidence", segment.mode == "prompt_evidence"
            for position in range(segment.position, segment.position + segment.length):
                begun = not gathering or position >= max(1, segment.frame.head)
                row[at] = segment.row if begun else 0
                slot[at] = segment.slot if gathering else spare
                counts[at] = int(gathering and segment.frame.speaks(position))
                gathers[at], settles[at], columns[at] = int(gathering), int(settling), column if settling else -1
                at += 1
        slot[at:] = [spare] * (tokens - at)
        columns[at:] = [-1] * (tokens - at)

        def on_device(numbers: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.tensor(numbers, dtype=dtype).to(device)

        return cls(
            on_device(row), on_device(slot), on_device(counts, torch.int8), on_device(gathers, torch.bool),
            on_device(settles, torch.bool), on_device(columns),
        )  # fmt: skip

    def copy_(self, other: "Batch") -> None:
        """Take over another step of as many tokens, in place."""
        for name in self.__dataclass_fields__:
            getattr(self, name).copy_(getattr(other, name))


@dataclass
class DeviceStep:
    """One forward pass over T tokens through S sites, and again after ``rewind``.

    tables: per site; bits int32 [rows, N / 32]; batch; modes: those that occur in it; sums fp64 [modules, slots + 1, N]
    (``EvidenceState.sums``); chunks: None when each token is a sequence of its own, else the runs; chosen int32
    [modules, T]: every choice of the last pass; nobody: no token may use anything, so that nothing need be added.
    """

    tables: Sequence[SiteTables]
    bits: torch.Tensor
    batch: Batch
    modes: frozenset[str]
    sums: torch.Tensor | None = None
    chunks: Chunks | None = None
    nobody: bool = False
    chosen: torch.Tensor = field(init=False)
    _value: torch.Tensor | None = field(init=False, default=None)
    _first: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        width = self.tables[0].adapters
        if any(table.adapters != width for table in self.tables):
            raise DeviceStepMismatch("all sites of a step must have the same adapters")
        if self.bits.shape[1] * 32 != width:
            raise DeviceStepMismatch(f"permission bits of {self.bits.shape[1]} words do not fit {width} adapters")
        modules = sum(table.modules for table in self.tables)
        self.chosen = torch.full((modules, self.tokens), -1, dtype=torch.int32, device=self.bits.device)
        if "evidence" in self.modes:
            if self.sums is None or self.sums.shape[0] != modules or self.sums.shape[2] != width:
                raise DeviceStepMismatch(f"evidence needs sums of {modules} modules and {width} adapters")
            self._value = torch.zeros(self.tokens, width, dtype=torch.float64, device=self.bits.device)

    @property
    def tokens(self) -> int:
        return self.batch.row.shape[0]

    @property
    def idle(self) -> bool:
        """Nothing is chosen and nothing gathered: every site is W x alone, and ``chosen`` stays at nobody."""
        return self.nobody and "evidence" not in self.modes

    def rewind(self) -> None:
        """Begin the next forward pass: what was summed over the modules of the last one is no part of it."""
        self._first = True

    def choose(self, site: int, first_module: int, z: torch.Tensor) -> tuple[Candidates, torch.Tensor]:
        """The site's choices for z [P, T, M r], and z, its parts added where it was scored. See ``route_tokens``."""
        tables, batch = self.tables[site], self.batch
        if self.modes == {"prompt_evidence"}:
            return Candidates.settled(batch.settled, tables.modules), z
        found: list[tuple[torch.Tensor | None, Candidates]] = []
        if "evidence" in self.modes and self.sums is not None and self._value is not None:
            sums = self.sums[first_module : first_module + tables.modules]
            if self.chunks is None:
                gathered, z = route_evidence(
                    z, tables, self.bits, batch.row, batch.slot, batch.counts, sums, self._value, self._first
                )
            else:
                z = add_parts(z)
                gathered = route_evidence_runs(
                    z, tables, self.bits, batch.row, self.chunks, batch.counts, sums, self._value, self._first
                )
            self._first = False
            found.append((batch.gathers, gathered))
        if "per_token" in self.modes:
            scored, z = route_tokens(z, tables, self.bits, batch.row)
            found.append((None, scored))
        if len(self.modes) == 1:
            return found[0][1], z
        choice = torch.where(batch.settles, batch.settled, -1).expand(tables.modules, -1)
        for mask, candidates in reversed(found):
            use = ~batch.gathers & ~batch.settles if mask is None else mask
            choice = torch.where(use, candidates.choice(), choice)
        column = choice[:, :, None]
        return Candidates(column, column), z


_current: ContextVar[DeviceStep | None] = ContextVar("seqr_device_step", default=None)


def current_step() -> DeviceStep:
    """The step around this forward pass; raises ``DeviceStepMissing``."""
    step = _current.get()
    if step is None:
        raise DeviceStepMissing("a routed site ran without a device step: set one before the forward pass")
    return step


def set_step(step: DeviceStep | None) -> None:
    """Make ``step``, rewound, the one that routed sites read in this thread or task; None: there is none."""
    if step is not None:
        step.rewind()
    _current.set(step)


def has_step() -> bool:
    """Whether routed sites have a step to read."""
    return _current.get() is not None


@contextmanager
def running(step: DeviceStep) -> Iterator[DeviceStep]:
    """``step``, rewound, around one forward pass (or around its capture in a CUDA graph)."""
    step.rewind()
    token = _current.set(step)
    try:
        yield step
    finally:
        _current.reset(token)
