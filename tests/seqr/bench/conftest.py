"""A benchmark in miniature: a tiny base model and three tasks of invented rows."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from seqr.bench.paper.store import Store
from seqr.bench.paper.training import Recipe
from seqr.bench.paper.workbench import Settings, Workbench
from seqr.tiny_model import build_tiny_model

TASKS = ("sst2", "cola", "hellaswag")
RECIPE = Recipe(rank=4, alpha=8.0, learning_rate=1e-2)


def invented(task: str, count: int, seed: int) -> list[dict[str, Any]]:
    dice = random.Random(f"{task} {seed}")
    rows: list[dict[str, Any]] = []
    for index in range(count):
        words = " ".join(dice.choice(["blue", "oak", "runs", "seven", "quiet", "of"]) for _ in range(4))
        if task == "hellaswag":
            endings = [f"{words[:6]} {number}" for number in range(4)]
            rows.append({"activity": "Walking", "ctx": words, "endings": endings, "label": index % 4})
        else:
            rows.append({"text": words, "label": index % 2})
    return rows


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("bench-model") / "tiny")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench-data")
    for task in TASKS:
        (folder / task).mkdir()
        for split, count in (("train", 16), ("test", 10)):
            lines = [json.dumps(row) for row in invented(task, count, split == "test")]
            (folder / task / f"{split}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


@pytest.fixture(scope="session")
def bench(tiny: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    folder = tmp_path_factory.mktemp("bench")
    settings = Settings(TASKS, (0,), 12, 6, 120, RECIPE, encoder=str(tiny))
    with torch.random.fork_rng(devices=[]):
        yield Workbench(tiny, data, Store(folder / "adapters", folder / "results"), settings)
