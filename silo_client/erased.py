"""Tombstones: which subjects were erased, as salted hashes, so that their rows cannot come back unnoticed."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from silo_client.state import State, read_json, write_json


@dataclass(frozen=True)
class Tombstone:
    """One erased subject. ``purged`` is true once its rows, and all that was trained on them, are gone.

    ``old_adapter_digest`` is the adapter that the erasure destroyed, None where nothing had been trained.
    """

    removed_commitments: tuple[str, ...]
    dataset_root_before: str
    old_adapter_digest: str | None
    purged: bool


class Tombstones:
    """The file ``erased.json``: salted hash of a subject -> tombstone, and the data files that erasures left empty."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._path = state.path / "erased.json"
        stored = read_json(self._path) or {"subjects": {}, "emptied": []}
        self._subjects: dict[str, Tombstone] = {
            name: Tombstone(**{**entry, "removed_commitments": tuple(entry["removed_commitments"])})
            for name, entry in stored["subjects"].items()
        }
        self._emptied: set[str] = set(stored["emptied"])

    def __len__(self) -> int:
        return len(self._subjects)

    def is_erased(self, subject: str) -> bool:
        return bool(self._subjects) and self._name(subject) in self._subjects

    def emptied(self, path: str) -> bool:
        """Whether an erasure took the last row out of the data file ``path``, so that its being empty is no mistake."""
        return path in self._emptied

    def get(self, subject: str) -> Tombstone | None:
        return self._subjects.get(self._name(subject))

    def put(self, subject: str, tombstone: Tombstone, emptied: Iterable[str]) -> None:
        """Write the tombstone of ``subject`` to the disk before anything of it is touched."""
        self._subjects[self._name(subject)] = tombstone
        self._emptied.update(emptied)
        self._save()

    def mark_purged(self, subject: str) -> Tombstone:
        name = self._name(subject)
        tombstone = self._subjects[name] = replace(self._subjects[name], purged=True)
        self._save()
        return tombstone

    def _save(self) -> None:
        subjects = {
            name: {**asdict(entry), "removed_commitments": list(entry.removed_commitments)}
            for name, entry in self._subjects.items()
        }
        write_json(self._path, {"subjects": subjects, "emptied": sorted(self._emptied)})

    def _name(self, subject: str) -> str:
        return self._state.salted("subject", subject)
