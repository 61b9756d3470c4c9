"""Requests as passes of the worker, submitted and ended by both of the engine's halves."""

from inference_gateway.engine.base import Failed
from inference_gateway.engine.batching_edge import BatchingEdge
from inference_gateway.engine.prefixes import chain_of
from inference_gateway.engine.sequences import Running, SequenceTable
from seqr.library import Library

REPLACED = Failed("adapter_replaced", "a silo's adapter changed while this answer was being written; ask again")
BROKEN = Failed("generation_failed", "the answer could not be finished because of an internal error; ask again")


class Passes:
    """Keeps the table of sequences and the worker's requests in step. From any thread."""

    def __init__(self, edge: BatchingEdge, sequences: SequenceTable, prefix_sharing: bool):
        self._edge = edge
        self._sequences = sequences
        self._prefix_sharing = prefix_sharing

    def submit(self, sequence: Running, library: Library) -> None:
        """Queue the pass that a sequence has come to. Raises ``EngineStopped``."""
        # The worker gives at least one token; of a prompt that is only read it is thrown away.
        tokens = 1 if sequence.reading else sequence.request.max_tokens
        if self._prefix_sharing:
            sequence.chain, sequence.library_version = chain_of(sequence, library), library.version
        self._edge.submit(sequence.pass_id, sequence.request.prompt, tokens, sorted(sequence.ends))
        if sequence.ended:  # by its asker, the policy or a swap, before there was a pass to cancel
            self._edge.cancel(sequence.pass_id)

    def cancel(self, pass_id: str) -> None:
        """Have the worker drop a pass whose request has ended; one that it does not have is none of its business."""
        self._edge.cancel(pass_id)

    def end(self, request_id: str, why: Failed | None) -> None:
        """End a request and cancel its pass, telling its asker why if given; one that has ended is left alone."""
        sequence = self._sequences.end(request_id, why)
        if sequence is not None:
            self._edge.cancel(sequence.pass_id)
