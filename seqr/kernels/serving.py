"""From what the gateway knows of a step (permission rows, segments, evidence) to what the kernels read."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from seqr.kernels.evidence_prefill import Chunks
from seqr.kernels.permission_bits import pack_bits
from seqr.kernels.step import Batch, DeviceStep, DeviceStepMismatch
from seqr.kernels.tables import SiteTables
from seqr.routing.evidence import EvidenceState
from seqr.routing.scores import choose

if TYPE_CHECKING:
    from seqr.library import PermissionRows
    from seqr.step import Segment


def device_step(
    rows: "PermissionRows",
    segments: Sequence["Segment"],
    tables: Sequence[SiteTables],
    evidence: EvidenceState | None = None,
    tokens: int | None = None,
) -> DeviceStep:
    """The step of ``seqr.step.StepContext`` with the same arguments, for sites with ``tables``.

    Opens the segments' evidence (``EvidenceState.begin``) after checking all of them; ``evidence.finish`` their slots
    after the pass. Raises ``EvidenceStale`` and ``DeviceStepMismatch``.
    """
    used = sum(segment.length for segment in segments)
    tokens = used if tokens is None else tokens
    if tokens < used or tokens == 0:
        raise DeviceStepMismatch(f"a step of {tokens} tokens cannot hold {used}")
    gathering = [segment for segment in segments if segment.mode == "evidence"]
    if gathering and evidence is None:
        raise DeviceStepMismatch("evidence routing needs an evidence state")
    if len({segment.slot for segment in gathering}) != len(gathering):
        raise DeviceStepMismatch("two segments of one step share an evidence slot")
    device, spare, chunks = rows.library.device, 0, None
    if evidence is not None and gathering:
        spare = evidence.slots
        for segment in gathering:
            evidence.check(segment.slot, segment.position)
        for segment in gathering:
            evidence.begin(segment.slot, segment.position, segment.length)
        if any(segment.length > 1 for segment in segments):
            lengths = [segment.length for segment in segments] + [tokens - used] * (tokens > used)
            slots = [s.slot if s.mode == "evidence" else spare for s in segments] + [spare] * (tokens > used)
            chunks = Chunks.of(lengths, slots, device)
    batch = Batch.of(segments, settled_columns(rows, segments), tokens, spare, device)
    return DeviceStep(
        tables,
        pack_bits(rows.table),
        batch,
        frozenset(segment.mode for segment in segments),
        evidence.sums if evidence is not None and gathering else None,
        chunks,
        nobody=all(segment.row == 0 for segment in segments),
    )


def settled_columns(rows: "PermissionRows", segments: Sequence["Segment"]) -> list[int]:
    """Per segment the permitted, everywhere finite column that its standing has most evidence for; -1 without one."""
    settled = [
        (index, segment, segment.standing) for index, segment in enumerate(segments) if segment.standing is not None
    ]
    columns = [-1] * len(segments)
    if settled:
        library = rows.library
        value = torch.stack([standing.row(library.columns, library.width) for _, _, standing in settled])
        row = torch.tensor([segment.row for _, segment, _ in settled])
        allowed = rows.table[row.to(library.device)] & library.finite
        for (index, _, _), column in zip(settled, choose(value.to(library.device), allowed).tolist(), strict=True):
            columns[index] = column
    return columns
