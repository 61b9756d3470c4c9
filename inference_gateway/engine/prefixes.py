"""What two requests must have in common before the keys and values of one may serve the other (decision 14).

A full block of a request's cache is named by a chain of hashes: block i's name covers all tokens up to its end, and the
chain's root covers everything else that its keys and values depend on. Names are keyed with a secret of the process.
"""

import json
import secrets
from array import array
from collections.abc import Sequence
from hashlib import blake2b

from inference_gateway.engine.base import AdapterKey, GenerationRequest
from inference_gateway.engine.sequences import Running
from seqr.library import Library, PermissionRows
from seqr.routing.evidence import Standing
from seqr.step import standing_lead

_SECRET = secrets.token_bytes(32)


def chain_of(sequence: Running, library: Library) -> list[bytes]:
    """The names of a pass's blocks before it has any: their root, or nothing if it must compute every token.

    In mode ``evidence`` it must: a token that is not computed says nothing.
    """
    request, winner = sequence.request, None
    if request.mode == "evidence":
        return []
    if request.mode == "prompt_evidence" and not sequence.reading:
        rows = PermissionRows(library)
        winner, _ = standing_lead(rows, rows.row_for(sequence.silos), sequence.standing or Standing({}))
    return [chain_root(request, library.version, winner, sequence.reading)]


def reach_of(sequence: Running) -> int:
    """How many of a prompt's tokens a pass may find in the cache: never the last, and no evidence where it reads."""
    before_last = len(sequence.request.prompt) - 1
    return min(before_last, sequence.silent) if sequence.reading else before_last


def chain_root(request: GenerationRequest, library_version: int, winner: str | None, reading: bool = False) -> bytes:
    """The root of a request's chain: its permitted set, mode and salt, the library, and whom its prompt spoke for.

    ``winner`` is the silo that a ``prompt_evidence`` request settled on; in other modes, and in the pass that reads its
    prompt, None.
    """
    keys = [(key.silo_id, key.revision, key.digest) for key in sorted(request.adapters, key=_by_name)]
    parts = [request.mode, reading, library_version, keys, winner, request.cache_salt]
    return blake2b(json.dumps(parts).encode(), key=_SECRET, digest_size=32).digest()


def block_name(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a block that holds ``tokens`` after the block (or root) named ``parent``."""
    return blake2b(parent + array("q", tokens).tobytes(), key=_SECRET, digest_size=32).digest()


def _by_name(key: AdapterKey) -> tuple[str, int, str]:
    return key.silo_id, key.revision, key.digest
