"""``compiled``: the passes of ``seqr.routing.compiled``, or None without Numba, where torch does the same, slower."""

__all__ = ["compiled"]

try:
    from seqr.routing import compiled
except ImportError:
    compiled = None  # type: ignore[assignment]
