"""One base model, the tasks' rows as tokens, and the adapters trained on them: what every experiment works on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from seqr.bench.errors import BenchAdapterMissing, BenchOptionInvalid
from seqr.bench.machine import device_name
from seqr.bench.paper.store import Store, adapter_digest
from seqr.bench.paper.tasks import Example, known_tasks, read_rows, sample
from seqr.bench.paper.training import Recipe, train_adapter
from seqr.canonical import canonical_json, sha256_hex
from seqr.models import base_model_digest, linear_module_names, load_base_model
from seqr.routers.pool import AdapterPool, Factors

TEST_SEED = 20_509  # the test rows are the same for every training seed, so that all comparisons are of the same rows


@dataclass(frozen=True)
class Settings:
    """What is run: the defaults are the standard run."""

    tasks: tuple[str, ...] = tuple(known_tasks())
    seeds: tuple[int, ...] = (0, 1, 2)
    train_rows: int = 400
    test_rows: int = 200
    max_tokens: int = 96
    recipe: Recipe = field(default_factory=Recipe)
    distractors: int = 1500
    encoder: str = ""  # a sentence-transformers model for LORAUTER, by path or hub id; empty: the one from PyPI

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks if task not in known_tasks()]
        if unknown:
            raise BenchOptionInvalid(f"there is no task {unknown[0]}; the tasks are {', '.join(known_tasks())}")
        least = min(self.train_rows, self.test_rows, self.distractors)
        if len(self.tasks) < 2 or not self.seeds or least < 1 or self.max_tokens < 16:
            raise BenchOptionInvalid(
                "at least two tasks, one seed, one training row, one test row, one distractor and 16 tokens are needed"
            )


def training_name(task: str, seed: int, shared: bool) -> str:
    """Under which name a run keeps which adapter it has, by digest, and the device that trained it."""
    return f"train/{seed}/{task}/{'shared' if shared else 'unique'}"


class Workbench:
    """Loads the model once, to torch's default device, where everything is then measured.

    Trains an adapter when it is first asked for, unless ``store`` has it.
    """

    def __init__(self, model_path: Path, data: Path, store: Store, settings: Settings):
        self.settings = settings
        self.store = store
        self.digest = base_model_digest(model_path)
        self.model_name = model_path.name
        self.data = data
        self.model, self.tokenizer = load_base_model(model_path, torch.float32)
        self.model.requires_grad_(False).to(torch.get_default_device())
        self.pad_token = int(self.tokenizer.pad_token_id or 0)
        specs = linear_module_names(self.model, "attention")
        self.modules = {spec.name: (spec.out_features, spec.in_features) for spec in specs}

    def train_examples(self, task: str, seed: int) -> list[Example]:
        """The training rows of a task for a seed."""
        return self._examples(task, "train", self.settings.train_rows, seed)

    def test_examples(self, task: str) -> list[Example]:
        """The test rows of a task, the same for every seed."""
        return self._examples(task, "test", self.settings.test_rows, TEST_SEED)

    def test_tokens(self, task: str) -> int:
        """About how many tokens one pass over a task's test prompts and answers takes, for estimates."""
        passes = 4 if known_tasks()[task].endings else 1
        return passes * self.settings.test_rows * self.settings.max_tokens

    def recipe_of(self, task: str, seed: int, shared: bool) -> dict[str, Any]:
        """Everything that decides the bytes of an adapter."""
        rows = [[e.prompt, e.candidates[e.gold]] for e in self.train_examples(task, seed)]
        # Training rounds otherwise on another kind of device, so its adapters are others.
        kind = torch.get_default_device().type
        elsewhere = {} if kind == "cpu" else {"device": kind}
        return elsewhere | {
            "base": self.digest, "recipe": self.settings.recipe.described(), "seed": seed, "shared": shared,
            "modules": sorted(self.modules), "rows": sha256_hex(canonical_json(rows)),
        }  # fmt: skip

    def adapter(self, task: str, seed: int, shared: bool) -> Factors:
        """The adapter of a task: with the A that all tasks of this seed share, or with an A of its own that learned."""
        # An A of its own is drawn for the task; a shared one for the seed alone.
        draw = seed if shared else 1000 * (seed + 1) + list(known_tasks()).index(task)
        name = training_name(task, seed, shared)
        if known := self.store.result(name):
            if (kept := self.store.kept_adapter(known["adapter"])) is not None:
                return kept
            if known["device"] == device_name():
                known = None  # lost, and trained again as it was
        if known:
            raise BenchAdapterMissing(
                f"the adapter of {task}, seed {seed}, was trained on {known['device']} and is not here: copy "
                f"{known['adapter']}.safetensors to {self.store.adapters}, or leave the seed out with --only-seeds"
            )
        recipe = self.recipe_of(task, seed, shared)
        factors = self.store.adapter(
            recipe,
            lambda: train_adapter(
                self.model, self.modules, self.train_examples(task, seed), self.pad_token, self.settings.recipe, draw,
                shared,
            ),
        )  # fmt: skip
        self.store.keep(name, {"adapter": adapter_digest(recipe), "device": device_name()})
        return factors

    def is_trained(self, task: str, seed: int, shared: bool) -> bool:
        """Whether this run has an adapter, and its file is here."""
        known = self.store.result(training_name(task, seed, shared))
        return known is not None and self.store.has_adapter(known["adapter"])

    @lru_cache(maxsize=3)  # noqa: B019 - one workbench per process
    def pool(self, seed: int, shared: bool = True) -> AdapterPool:
        """The adapters of all tasks for a seed, in the order of the tasks, on torch's default device."""
        adapters = {task: self.adapter(task, seed, shared) for task in self.settings.tasks}
        with torch.device("cpu"):
            pool = AdapterPool(adapters, tuple(self.modules))
        return pool.to(torch.get_default_device())

    @lru_cache(maxsize=64)  # noqa: B019
    def _examples(self, task: str, split: str, count: int, seed: int) -> list[Example]:
        rows: Sequence[dict[str, Any]] = sample(read_rows(self.data, task, split), count, seed)
        return [known_tasks()[task].example(row, self.tokenizer, self.settings.max_tokens) for row in rows]
