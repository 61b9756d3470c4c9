"""Merkle root over a silo's record digests, hashed as RFC 6962 section 2.1 does."""

import hashlib
from collections.abc import Sequence

_LEAF = b"\x00"
_NODE = b"\x01"


def merkle_root(leaves: Sequence[bytes]) -> str:
    """The root (hex) of ``leaves`` in the order given; callers whose leaves are a set sort them first.

    Leaves and inner nodes have different prefixes, so no inner node can be passed off as a record. The root of no
    leaves is the SHA-256 of nothing.
    """
    if not leaves:
        return hashlib.sha256(b"").hexdigest()
    level = [hashlib.sha256(_LEAF + leaf).digest() for leaf in leaves]
    while len(level) > 1:
        # Pairing neighbours and carrying an odd last node up gives RFC 6962's tree, which splits at powers of two.
        paired = [hashlib.sha256(_NODE + a + b).digest() for a, b in zip(level[::2], level[1::2], strict=False)]
        level = paired + level[len(paired) * 2 :]
    return level[0].hex()
