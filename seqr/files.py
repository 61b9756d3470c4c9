"""Private files: written whole or not at all, and on the disk before anyone relies on them."""

import os
from pathlib import Path


def write_private(path: Path, data: bytes, *, replace: bool = True) -> None:
    """Write ``data`` to ``path`` with mode 0600, durably, whole or not at all.

    A link at ``path`` is replaced, not followed. Raises FileExistsError where something is there already and
    ``replace`` is false, and OSError when it cannot be written; what was there then stays as it was.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o600)  # a file left by a killed run keeps its old mode otherwise
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        if replace:
            os.replace(partial, path)
        else:
            os.link(partial, path)  # unlike rename, refuses to replace an existing file
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder onto the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
