"""Looking for secrets in every byte of every file below a folder."""

from collections.abc import Iterable
from pathlib import Path

WINDOW = 64


def files_with(folder: Path, needle: bytes, leave_out: Iterable[Path] = ()) -> list[Path]:
    """Every file below ``folder`` that holds ``needle``, except those below ``leave_out``."""
    skipped = tuple(leave_out)
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(path.is_relative_to(root) for root in skipped) and needle in path.read_bytes()
    ]


def windows(secret: bytes, count: int = 64) -> list[bytes]:
    """``count`` windows of ``WINDOW`` bytes, evenly spread over ``secret``."""
    last = len(secret) - WINDOW
    return [secret[start : start + WINDOW] for start in range(0, last + 1, max(1, last // count))]


def files_with_any(folder: Path, needles: Iterable[bytes]) -> list[Path]:
    """Every file below ``folder`` that holds at least one of ``needles``."""
    sought = list(needles)
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            if any(needle in content for needle in sought):
                found.append(path)
    return found
