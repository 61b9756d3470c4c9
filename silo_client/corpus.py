"""The silo's corpus under a plan: the records that can be trained on, as tokens, and the digest of the whole."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from silo_client.config import SiloConfig
from silo_client.dataset import Encoder, Example
from silo_client.errors import DataError, NoRecords
from silo_client.records import collect, commitments, dataset_root

if TYPE_CHECKING:
    from silo_client.erased import Tombstones


@dataclass(frozen=True)
class Corpus:
    """``examples`` in no particular order, the rows that cannot be used, and how many rows only repeated another."""

    examples: tuple[Example, ...]
    problems: tuple[DataError, ...]
    repeated: int
    commitments: tuple[str, ...]

    @property
    def root(self) -> str:
        """The Merkle root that stands for this set of records in manifests and receipts."""
        return dataset_root(self.commitments)

    @property
    def tokens(self) -> int:
        return sum(len(example.tokens) for example in self.examples)


def load_corpus(config: SiloConfig, encoder: Encoder, tombstones: "Tombstones", salt: bytes) -> Corpus:
    """Read and tokenise all records; problems are collected, not raised."""
    collection = collect(config, is_erased=tombstones.is_erased, may_be_empty=tombstones.emptied)
    examples, too_long = encoder.encode_all(collection.records)
    return Corpus(
        tuple(examples),
        (*collection.problems, *too_long),
        collection.repeated,
        tuple(commitments((example.record for example in examples), salt)),
    )


def require_usable(corpus: Corpus, *, skip_bad: bool, tell: Callable[[str], None] = lambda sentence: None) -> None:
    """Refuse to go on over bad rows, unless they may be skipped, or without a single record.

    ``tell`` receives one sentence on what was left out.

    Raises:
        DataError: the first problem, of its own class, with the number of further ones.
        NoRecords: nothing is left to train on.
    """
    if corpus.problems and not skip_bad:
        _raise_first(corpus.problems)
    if not corpus.examples:
        raise NoRecords("no usable record was found in the data files; run 'seqr silo check' to see why")
    if corpus.problems:
        tell(f"left out {_count(len(corpus.problems), 'bad row')} ('seqr silo check' lists them)")
    if corpus.repeated:
        tell(f"{_count(corpus.repeated, 'row')} only repeated another and counted once")


def _raise_first(problems: tuple[DataError, ...]) -> None:
    first, more = problems[0], len(problems) - 1
    if not more:
        raise first
    what = str(first).removeprefix(f"{first.where}: ")
    raise type(first)(
        first.where, f"{what} ({_count(more, 'more bad row')}: 'seqr silo check' lists them, --skip-bad skips them)"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
