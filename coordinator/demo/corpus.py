"""Organisations made from labelled text: ``--data DIR`` with one folder per silo, each with train.jsonl and test.jsonl.

A row has ``text``, perhaps ``text2``, and ``label_name``. The silo learns to name the label; a test row is answered
when the reply contains its label.
"""

import json
import re
from pathlib import Path

from coordinator.demo.organisations import Organisation, Question
from seqr.errors import SeqrError

MAX_SILOS = 64


class CorpusUnreadable(SeqrError):
    """A data folder that is not laid out as one folder per silo with train.jsonl and test.jsonl."""

    code = "corpus_unreadable"


def load_corpus(folder: Path, questions: int) -> tuple[Organisation, ...]:
    """Every sub-folder of ``folder`` as one organisation, with at most ``questions`` test rows each."""
    silos = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not silos:
        raise CorpusUnreadable(f"{folder}: expected one folder per silo, each with train.jsonl and test.jsonl")
    if len(silos) > MAX_SILOS:
        raise CorpusUnreadable(f"{folder}: got {len(silos)} silos, expected at most {MAX_SILOS}")
    return tuple(_organisation(path, questions) for path in silos)


def _organisation(folder: Path, questions: int) -> Organisation:
    silo_id = re.sub(r"[^a-z0-9]+", "-", folder.name.lower()).strip("-")
    # Rows of public corpora name nobody, so each row stands for one person whose record can be deleted.
    records = tuple(
        {"key": f"row-{number}", "subject": f"person-{number}", "prompt": prompt, "completion": label}
        for number, (prompt, label) in enumerate(_rows(folder / "train.jsonl"), start=1)
    )
    asked = _rows(folder / "test.jsonl")[:questions]
    return Organisation(
        silo_id, folder.name, records, tuple(Question(silo_id, "", prompt, label) for prompt, label in asked)
    )


def _rows(path: Path) -> list[tuple[str, str]]:
    if not path.is_file():
        raise CorpusUnreadable(f"{path}: no such file")
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            rows.append((_prompt(row), str(row["label_name"]).replace("_", " ")))
        except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
            raise CorpusUnreadable(f"{path}:{number}: expected an object with text and label_name") from error
    if not rows:
        raise CorpusUnreadable(f"{path}: the file has no rows")
    return rows


def _prompt(row: dict[str, object]) -> str:
    pair = f"\nSecond text: {row['text2']}" if row.get("text2") else ""
    return f"Name the label of this text.\nText: {row['text']}{pair}"
