"""Erasing a subject: its rows leave the data files, and whatever was trained on them leaves the state directory.

The steps are ordered so that a kill between any two of them is repaired by doing the same erasure again: the tombstone
is written first (from then on the subject's rows are refused everywhere), then the files, then the adapters.
"""

import json
import logging
import os
import shutil
import stat
from collections.abc import Iterable
from dataclasses import dataclass

from seqr.canonical import sha256_hex
from seqr.files import sync_folder
from seqr.job import record_commitment
from silo_client.config import DataSource, SiloConfig
from silo_client.data import Row, read_rows
from silo_client.erased import Tombstone, Tombstones
from silo_client.errors import NO_SUBJECT_COLUMN, DataError, DataFileBusy, SubjectColumnMissing, SubjectUnknown
from silo_client.records import dataset_root, subject_of, to_record
from silo_client.state import State

log = logging.getLogger("seqr.silo")


@dataclass(frozen=True)
class Match:
    """The rows of one data file that are about the subject: their digests, and whether they are all it holds."""

    source: DataSource
    digests: tuple[str, ...]
    empties: bool


def find(config: SiloConfig, subject: str) -> list[Match]:
    """The data files with rows about ``subject``. A row that cannot be read counts when it contains the subject's name.

    Raises:
        DataError: a data file as a whole cannot be read, so that nothing can be said about it.
        SubjectColumnMissing: no data file says whose record a row is.
    """
    if all(source.subject_column is None for source in config.data):
        raise SubjectColumnMissing(NO_SUBJECT_COLUMN)
    matches = []
    for source in config.data:
        if source.subject_column is None:
            continue
        digests: list[str] = []
        others = 0
        for row in read_rows(config.resolve(source.path), source):
            if _is_about(row, source, subject):
                digests.append(_digest(row, source))
            else:
                others += row.fields is not None or row.error is not None
        if digests:
            matches.append(Match(source, tuple(digests), empties=not others))
    return matches


def erase(
    config: SiloConfig,
    state: State,
    tombstones: Tombstones,
    subject: str,
    *,
    usable: Iterable[str],
    old_adapter_digest: str | None,
) -> Tombstone:
    """Remove every row about ``subject`` and every adapter, checkpoint and reply made before; idempotent.

    Args:
        usable: the salted commitments of the silo's corpus as it stands.
        old_adapter_digest: the adapter that the removal makes invalid.

    Raises:
        SubjectUnknown: no row is about the subject and none ever was; nothing has been changed.
        DataError: a data file cannot be read or is being written by someone else; nothing has been removed from it.
    """
    matches = find(config, subject)
    tombstone = tombstones.get(subject)
    if matches:
        tombstone = _tombstone(state, matches, tombstone, usable, old_adapter_digest)
        tombstones.put(subject, tombstone, (str(match.source.path) for match in matches if match.empties))
        for match in matches:
            _rewrite_without(config, match.source, subject)
        log.info("records of a subject were removed from the data files")
    elif tombstone is None:
        raise SubjectUnknown("no record in the data files is about this subject; nothing was changed")
    if not tombstone.purged:
        purge(state)
        tombstone = tombstones.mark_purged(subject)
        log.info("adapters, checkpoints and replies made before the erasure were destroyed")
    return tombstone


def purge(state: State) -> None:
    """Destroy every adapter, checkpoint and stored reply."""
    for name in ("adapters", "checkpoints", "replies"):
        folder = state.path / name
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        sync_folder(folder)


def _tombstone(
    state: State, matches: list[Match], earlier: Tombstone | None, usable: Iterable[str], old_adapter_digest: str | None
) -> Tombstone:
    now = {record_commitment(state.salt, bytes.fromhex(digest)) for match in matches for digest in match.digests}
    removed = now | set(earlier.removed_commitments if earlier else ())
    if earlier is not None and not earlier.purged:
        # The earlier attempt was cut short: what it noted about the state before is what was true before.
        return Tombstone(tuple(sorted(removed)), earlier.dataset_root_before, earlier.old_adapter_digest, purged=False)
    return Tombstone(tuple(sorted(removed)), dataset_root({*usable, *removed}), old_adapter_digest, purged=False)


def _is_about(row: Row, source: DataSource, subject: str) -> bool:
    if row.fields is not None:
        try:
            return subject_of(row, source) == subject
        except DataError:
            pass
    elif row.error is None:
        return False
    return subject.encode() in row.raw or json.dumps(subject)[1:-1].encode() in row.raw


def _digest(row: Row, source: DataSource) -> str:
    try:
        return to_record(row, source).digest if row.fields is not None else sha256_hex(row.raw)
    except DataError:
        return sha256_hex(row.raw)


def _rewrite_without(config: SiloConfig, source: DataSource, subject: str) -> None:
    """Write the file again without the subject's rows, all other bytes as they were, whole or not at all."""
    path = config.resolve(source.path).resolve()
    partial = path.with_name(f".{path.name}.erasing")
    before = path.stat()
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        for row in read_rows(path, source):
            if not _is_about(row, source, subject):
                file.write(row.raw)
        file.flush()
        os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode))
        _keep_owner(file.fileno(), before)
        os.fsync(file.fileno())
    if _identity(path.stat()) != _identity(before):
        partial.unlink()
        raise DataFileBusy(
            str(source.path), "the data file changed during the erasure; stop writing to it and try again"
        )
    os.replace(partial, path)
    sync_folder(path.parent)


def _keep_owner(descriptor: int, before: os.stat_result) -> None:
    now = os.fstat(descriptor)
    if (now.st_uid, now.st_gid) != (before.st_uid, before.st_gid):
        os.fchown(descriptor, before.st_uid, before.st_gid)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_size, status.st_mtime_ns
