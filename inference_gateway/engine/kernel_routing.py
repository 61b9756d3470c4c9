"""Routing on a GPU by ``seqr.kernels``: which steps take it, and what the engine asks of such a step.

Needs Triton. Some of what a step may be asked the kernels do not compute; such a step is a ``StepContext``, whose
``RoutedLinear`` are still there: one in which a prompt is only read, whose words weigh by ``recency``, and one that is
asked by how much a choice that it makes itself was ahead.
"""

from collections.abc import Sequence

import torch
from torch import nn

from inference_gateway.engine.attribution import Part
from seqr.kernels.adapted import AdaptedSites
from seqr.kernels.serving import device_step
from seqr.kernels.step import set_step
from seqr.kernels.tables import SiteTables
from seqr.library import Library, PermissionRows
from seqr.plan import Plan
from seqr.routing.evidence import EvidenceState
from seqr.step import Segment


class KernelStep:
    """A step by the kernels: of ``seqr.step.StepContext`` what the engine uses. It is current once it is made."""

    def __init__(
        self,
        rows: PermissionRows,
        segments: Sequence[Segment],
        tables: Sequence[SiteTables],
        evidence: EvidenceState,
        tokens: int,
        watched: Sequence[int],
    ):
        self.library = rows.library
        self._evidence = evidence
        self._slots = [segment.slot for segment in segments if segment.mode == "evidence"]
        self._watched = len(watched)
        self._step = device_step(rows, segments, tables, evidence, tokens)
        set_step(self._step)

    def finish(self) -> None:
        """Close the step after its forward pass, so that its sequences can go on."""
        self._evidence.finish(self._slots)

    def choice_counts(self, tokens: Sequence[int]) -> torch.Tensor:
        """int64 [T, N] on the CPU: how many modules chose each column for each of ``tokens``."""
        chosen = self._step.chosen[:, list(tokens)].T.to("cpu", torch.int64) + 1
        counts = torch.zeros(len(tokens), self.library.width + 1, dtype=torch.int64)
        return counts.scatter_add_(1, chosen, torch.ones_like(chosen))[:, 1:]

    def margins(self) -> list[float | None]:
        """None for each watched token: their choices were made before, see ``KernelRouting.takes``."""
        return [None] * self._watched


class KernelRouting:
    """An adapted model's sites and the tables that they read of the current library."""

    def __init__(self, model: nn.Module, plan: Plan, library: Library):
        """Raises ``SiteMismatch`` where the kernels cannot run."""
        self._sites = AdaptedSites.of(model, plan)
        self.tables = self.tables_of(library)

    def tables_of(self, library: Library) -> tuple[SiteTables, ...]:
        """What the sites read of ``library``; to become ``tables`` between two steps."""
        return self._sites.tables(library)

    @staticmethod
    def takes(segments: Sequence[Segment], parts: Sequence[Part]) -> bool:
        """Whether the kernels compute all that this step is asked."""
        told = (part.sequence.request.mode for part in parts if part.predicts)
        return all(segment.recent is None for segment in segments) and all(mode == "prompt_evidence" for mode in told)

    def step(
        self,
        rows: PermissionRows,
        segments: Sequence[Segment],
        evidence: EvidenceState,
        tokens: int,
        watched: Sequence[int],
    ) -> KernelStep:
        """Begin a step; ``leave`` when it has ended. See ``seqr.kernels.serving.device_step``."""
        return KernelStep(rows, segments, self.tables, evidence, tokens, watched)

    @staticmethod
    def leave() -> None:
        """Routed layers read no step of the kernels from here on."""
        set_step(None)
