"""Which silo shaped which token: taken from a step's choices, for the requests that asked for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from inference_gateway.engine.base import TokenShares
from inference_gateway.engine.sequences import Running
from inference_gateway.engine.stepper import Batch
from seqr.library import PermissionRows
from seqr.routing.evidence import GRID, Standing, total_recency
from seqr.step import StepContext, standing_lead

if TYPE_CHECKING:  # needs Triton
    from inference_gateway.engine.kernel_routing import KernelStep


@dataclass(frozen=True)
class Part:
    """One request's tokens in a step: indices ``first`` to ``end`` (not included) of the flat batch.

    ``answers``: those from this one on predict a token of the answer; ``predicts``: the last one is handed out.
    """

    sequence: Running
    first: int
    answers: int
    end: int
    predicts: bool


def attributed_parts(batch: Batch, find: Callable[[str], Running | None]) -> list[Part]:
    """The parts of a batch whose requests want attribution; a prompt that is only read has none."""
    parts, first = [], 0
    for one in batch.slices:
        sequence, end = find(one.request_id), first + one.length
        if sequence is not None and sequence.request.attribution and not sequence.reading:
            answers = first + max(0, len(sequence.request.prompt) - 1 - one.position)
            parts.append(Part(sequence, first, min(answers, end), end, one.predicts))
        first = end
    return parts


def watched_tokens(parts: Sequence[Part]) -> list[int]:
    """The tokens of a flat batch that somebody will be told the margin of."""
    return [part.end - 1 for part in parts if part.predicts]


def attribute(parts: Sequence[Part], step: "StepContext | KernelStep", modules: int) -> None:
    """Add a finished step to its requests' shares, and leave the shares of the token that is about to be handed out."""
    if not parts:
        return
    counts = step.choice_counts([token for part in parts for token in range(part.first, part.end)])
    margins = dict(zip(watched_tokens(parts), step.margins(), strict=True))
    silos, row = step.library.silos, 0
    for part in parts:
        sequence = part.sequence
        own = counts[row : row + part.end - part.first]
        row += part.end - part.first
        _add(sequence.counts, silos, own.sum(0).tolist())
        _add(sequence.answer_counts, silos, own[part.answers - part.first :].sum(0).tolist())
        sequence.choices += (part.end - part.first) * modules
        sequence.answer_choices += (part.end - part.answers) * modules
        if part.predicts:
            last: dict[str, int] = {}
            _add(last, silos, own[-1].tolist())
            settled = sequence.request.mode == "prompt_evidence"
            margin = sequence.margin if settled else margins[part.end - 1]
            sequence.token_shares.append(TokenShares(last, modules, margin))


def prompt_margin(sequence: Running, rows: PermissionRows, standing: Standing, modules: int) -> float | None:
    """By how much a prompt spoke for its winner: the difference of the mean scores, late words weighing more."""
    _, ahead = standing_lead(rows, rows.row_for(sequence.silos), standing)
    spoken = sequence.request.frame.spoken(len(sequence.request.prompt))
    return None if ahead is None else ahead / (GRID * total_recency(max(1, spoken)) * modules)


def _add(counts: dict[str, int], silos: Sequence[str], totals: Sequence[int]) -> None:
    for silo, total in zip(silos, totals, strict=False):
        if total:
            counts[silo] = counts.get(silo, 0) + int(total)
