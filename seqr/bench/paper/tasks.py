"""The ten tasks as prompts and candidate answers, read from ``prompts.toml`` and a data folder."""

import json
import random
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from seqr.bench.errors import BenchDataMissing, BenchDataUnreadable

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Example:
    """One row as tokens: the prompt, one continuation per candidate answer, and which of them is right.

    weights: what each candidate's log-likelihood is divided by, 1 for label words and bytes for whole endings.
    """

    text: str
    prompt: tuple[int, ...]
    candidates: tuple[tuple[int, ...], ...]
    weights: tuple[float, ...]
    gold: int


@dataclass(frozen=True)
class Task:
    """One entry of ``prompts.toml``."""

    name: str
    prompt: str
    labels: tuple[str, ...] = ()
    endings: str = ""

    def example(self, row: Mapping[str, Any], tokenizer: Any, max_tokens: int) -> Example:
        """A row of the data as tokens; its longest field is cut until prompt and answer fit ``max_tokens``.

        Raises ``BenchDataUnreadable`` for a row without the fields of the prompt or with a label out of range.
        """
        try:
            answers = self.labels or tuple(str(ending) for ending in row[self.endings])
            fields = {key: str(value) for key, value in row.items()}
            gold = int(row["label"])
            text = self.prompt.format_map(fields)
        except (KeyError, TypeError, ValueError) as error:
            raise BenchDataUnreadable(f"a row of {self.name} has no usable field {error}") from None
        if not 0 <= gold < len(answers):
            raise BenchDataUnreadable(f"a row of {self.name} has label {gold}; the task has {len(answers)} answers")
        continuations = tuple(tuple(tokenizer(f" {a}", add_special_tokens=False)["input_ids"]) for a in answers)
        room = max_tokens - max(len(c) for c in continuations)
        prompt = tuple(tokenizer(text)["input_ids"])
        while len(prompt) > room and _shorten(fields, self.prompt, len(prompt) - room, from_start=bool(self.endings)):
            text = self.prompt.format_map(fields)
            prompt = tuple(tokenizer(text)["input_ids"])
        weights = tuple(float(len(a.encode())) if self.endings else 1.0 for a in answers)
        return Example(text, prompt, continuations, weights, gold)


def _shorten(fields: dict[str, str], prompt: str, tokens: int, from_start: bool) -> bool:
    """Drop some words of the longest field that the prompt uses; False when there is nothing to drop."""
    longest = max((key for key in fields if "{" + key + "}" in prompt), key=lambda key: len(fields[key]))
    words = fields[longest].split(" ")
    keep = len(words) - max(1, tokens // 2)
    if keep < 1:
        if len(words) == 1:
            fields[longest] = fields[longest][: len(fields[longest]) // 2]
            return bool(fields[longest])
        keep = len(words) // 2
    fields[longest] = " ".join(words[-keep:] if from_start else words[:keep])
    return True


@cache
def known_tasks() -> Mapping[str, Task]:
    """Every task of ``prompts.toml`` by name, in file order."""
    text = (files(__package__ or __name__) / "prompts.toml").read_text("utf-8")
    return {
        name: Task(name, entry["prompt"], tuple(entry.get("labels", ())), entry.get("endings", ""))
        for name, entry in tomllib.loads(text).items()
    }


def read_rows(data: Path, task: str, split: str) -> list[dict[str, Any]]:
    """The rows of ``data/task/split.jsonl``; raises ``BenchDataMissing`` or ``BenchDataUnreadable``."""
    file = data / task / f"{split}.jsonl"
    try:
        lines = file.read_text("utf-8").splitlines()
    except OSError:
        raise BenchDataMissing(
            f"{file} is not there; --data names a folder with <task>/train.jsonl and <task>/test.jsonl"
        ) from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            raise BenchDataUnreadable(f"{file}, line {number}, is not JSON") from None
        if not isinstance(row, dict):
            raise BenchDataUnreadable(f"{file}, line {number}, is not a JSON object")
        rows.append(row)
    if not rows:
        raise BenchDataUnreadable(f"{file} has no rows")
    return rows


def sample(rows: Sequence[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` rows without replacement (all, where there are fewer), the same for the same seed."""
    return random.Random(seed).sample(list(rows), min(count, len(rows)))
