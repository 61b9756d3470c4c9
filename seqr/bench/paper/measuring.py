"""The measurements of a run, each made once and kept by name: training, calibration, reading, answers."""

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import Any

import torch

from seqr.bench.encoder import sentence_encoder
from seqr.bench.machine import device_name
from seqr.bench.paper.reading import Norms, read
from seqr.bench.paper.routed import Outcome, averaged, run, with_columns
from seqr.bench.paper.scoring import answers
from seqr.bench.paper.workbench import Workbench
from seqr.public_text import public_texts
from seqr.routers.arrow import ArrowRouter
from seqr.routers.evidence import EvidenceRouter
from seqr.routers.interface import Router
from seqr.routers.lag import LagRouter
from seqr.routers.lorauter import Encoder, LorauterRouter, task_vector
from seqr.routers.norms import Spectrum
from seqr.routers.seqr import SeqrRouter
from seqr.routers.spectr import SpectrRouter
from seqr.routers.statistics import Statistics

OWN_ROWS = 100  # training rows per task whose tokens give the paper's own-data mu and sigma
LAG_K = 3  # as the paper has it for ten adapters
TOKEN_ROUTERS = ("seqr", "lag", "arrow", "lorauter", "evidence", "seqr_public", "spectr")


class Measuring:
    """What can be measured with a ``Workbench``; every method returns at once what its store has."""

    def __init__(self, bench: Workbench):
        self.bench = bench
        self.store = bench.store
        self._known: dict[str, torch.Tensor] = {}

    # -- calibration ---------------------------------------------------------------------------------------------------

    def public(self, seed: int, shared: bool = True) -> Norms:
        """The norms of all adapters of a seed on the public text."""
        name = f"public/{_pool(seed, shared)}"
        tensors = self.store.arrays(name)
        if tensors is None:
            tokens = [self.bench.tokenizer(text)["input_ids"] for text in public_texts()]
            norms = read(self.bench.model, self.bench.pool(seed, shared), tokens, self.bench.pad_token)
            tensors = norms.tensors()
            self.store.keep_arrays(name, tensors)
        return Norms(**tensors)

    @lru_cache(maxsize=8)  # noqa: B019 - one per process
    def public_statistics(self, seed: int, shared: bool = True) -> Statistics:
        """mu and sigma of all adapters of a seed on the public text."""
        return self.public(seed, shared).statistics()

    def own_moments(self, task: str, seed: int, shared: bool = True) -> dict[str, torch.Tensor]:
        """mu, sigma fp64 [M] of a task's adapter on its own training prompts, with that adapter active (the paper)."""
        name = f"own/{_pool(seed, shared)}/{task}"
        tensors = self.store.arrays(name)
        if tensors is None:
            rows = self.bench.train_examples(task, seed)[:OWN_ROWS]
            column = self.bench.settings.tasks.index(task)
            norms = read(
                self.bench.model, self.bench.pool(seed, shared), [e.prompt for e in rows], self.bench.pad_token, column
            )
            statistics = norms.statistics()
            tensors = {"mu": statistics.mu[:, column], "sigma": statistics.sigma[:, column]}
            self.store.keep_arrays(name, tensors)
        return tensors

    def own_statistics(self, seed: int, shared: bool = True) -> Statistics:
        """The paper's mu and sigma: each adapter's from its own data."""
        each = [self.own_moments(task, seed, shared) for task in self.bench.settings.tasks]
        return Statistics(torch.stack([one["mu"] for one in each], 1), torch.stack([one["sigma"] for one in each], 1))

    def norms(self, task: str, seed: int, shared: bool = True) -> Norms:
        """The norms of all adapters of a seed on the test prompts of a task, read from the base model."""
        name = f"read/{_pool(seed, shared)}/{task}"
        tensors = self.store.arrays(name)
        if tensors is None:
            prompts = [e.prompt for e in self.bench.test_examples(task)]
            tensors = read(self.bench.model, self.bench.pool(seed, shared), prompts, self.bench.pad_token).tensors()
            self.store.keep_arrays(name, tensors)
        return Norms(**tensors)

    # -- answers -------------------------------------------------------------------------------------------------------

    def answered(self, router: str, task: str, seed: int) -> dict[str, Any]:
        """right, share and predicted of a router on the test rows of a task: one entry per row.

        base is the same for every seed; unique_oracle has adapters with an A of their own.
        """
        name = self.answer_name(router, task, seed)
        value = self.store.result(name)
        if value is None:
            outcome = self._answer(router, task, seed)
            gold = [e.gold for e in self.bench.test_examples(task)]
            right = [int(p == g) for p, g in zip(outcome.predicted, gold, strict=True)]
            value = {"right": right, "share": [round(s, 4) for s in outcome.share], "predicted": outcome.predicted}
            value["device"] = device_name()
            self.store.keep(name, value)
        return dict(value)

    @staticmethod
    def answer_name(router: str, task: str, seed: int) -> str:
        """Where ``answered`` is kept."""
        return f"answer/{router}/{'all' if router == 'base' else seed}/{task}"

    def given(self, task: str, seed: int, columns: Sequence[int]) -> list[int]:
        """The answer of each test row of a task when it is given adapter ``columns[row]`` for all its tokens.

        Rows and adapters that have met before are looked up.
        """
        name = f"given/{seed}/{task}"
        known: dict[str, int] = self.store.result(name) or {}
        own = self.bench.settings.tasks.index(task)
        oracle = self.answered("oracle", task, seed)["predicted"]
        known |= {f"{row} {own}": answer for row, answer in enumerate(oracle)}
        base = self.answered("base", task, seed)["predicted"]
        known |= {f"{row} -1": answer for row, answer in enumerate(base)}
        missing = [row for row, column in enumerate(columns) if f"{row} {column}" not in known]
        examples = self.bench.test_examples(task)
        found = with_columns(
            self.bench.model, self.bench.pool(seed), [examples[row] for row in missing],
            [columns[row] for row in missing], self.bench.pad_token,
        )  # fmt: skip
        known |= {f"{row} {columns[row]}": answer for row, answer in zip(missing, found, strict=True)}
        self.store.keep(name, known)
        return [known[f"{row} {column}"] for row, column in enumerate(columns)]

    def _answer(self, router: str, task: str, seed: int) -> Outcome:
        bench = self.bench
        examples, own = bench.test_examples(task), bench.settings.tasks.index(task)
        rows = len(examples)
        if router == "base":
            return Outcome(answers(bench.model, examples, 0, bench.pad_token), [0.0] * rows)
        if router in ("oracle", "unique_oracle"):
            pool = bench.pool(seed, router == "oracle")
            return Outcome(with_columns(bench.model, pool, examples, [own] * rows, bench.pad_token), [1.0] * rows)
        if router == "lorauter":
            self.remember(task)
        if router == "mu":
            predicted = with_columns(bench.model, averaged(bench.pool(seed)), examples, [0] * rows, bench.pad_token)
            return Outcome(predicted, [1.0 / len(bench.pool(seed))] * rows)
        return run(bench.model, self.router(router, seed), examples, own, bench.pad_token)

    @lru_cache(maxsize=4)  # noqa: B019
    def router(self, name: str, seed: int) -> Router:
        """One of ``TOKEN_ROUTERS`` over the adapters of a seed that share A."""
        pool = self.bench.pool(seed)
        if name == "seqr":
            return SeqrRouter(pool, self.own_statistics(seed))
        if name == "seqr_public":
            return SeqrRouter(pool, self.public_statistics(seed))
        if name == "spectr":
            return SpectrRouter(pool, self.own_statistics(seed), self.spectrum(seed))
        if name == "lag":
            return LagRouter(pool, LAG_K, self.own_statistics(seed), self.spectrum(seed))
        if name == "arrow":
            return ArrowRouter(pool, self.spectrum(seed))
        if name == "evidence":
            return EvidenceRouter(pool, self.public_statistics(seed))
        if name == "lorauter":
            return LorauterRouter(pool, self.encoder, self.task_vectors(seed), {t: t for t in pool.names})
        raise ValueError(f"there is no router {name}")

    @lru_cache(maxsize=1)  # noqa: B019
    def spectrum(self, seed: int) -> Spectrum:
        """The singular values and vectors of a seed's adapters."""
        return Spectrum(self.bench.pool(seed))

    # -- what LORAUTER reads -------------------------------------------------------------------------------------------

    @cached_property
    def sentences(self) -> Encoder:
        """LORAUTER's sentence encoder, loaded when it is first needed."""
        return sentence_encoder(self.bench.settings.encoder)

    def prompts(self, task: str) -> torch.Tensor:
        """The embeddings of a task's test prompts: fp32 [rows, d]."""
        examples = self.bench.test_examples(task)
        return self._texts(f"texts/test/{task}", lambda: self.sentences([e.text for e in examples]))

    def remember(self, task: str) -> None:
        """Make the embeddings of a task's test prompts known to ``encoder``."""
        texts = [e.text for e in self.bench.test_examples(task)]
        self._known |= dict(zip(texts, self.prompts(task), strict=True))

    def encoder(self, texts: Sequence[str]) -> torch.Tensor:
        """The embeddings fp32 [S, d] of test prompts of tasks that ``remember`` has been given."""
        return torch.stack([self._known[text] for text in texts])

    @lru_cache(maxsize=4)  # noqa: B019
    def task_vectors(self, seed: int) -> dict[str, torch.Tensor]:
        """The task vector of every task, from the prompts of its training rows."""

        def all_tasks() -> torch.Tensor:
            rows = (self.bench.train_examples(task, seed) for task in self.bench.settings.tasks)
            return torch.stack([task_vector(self.sentences, [e.text for e in examples]) for examples in rows])

        return dict(zip(self.bench.settings.tasks, self._texts(f"texts/tasks/{seed}", all_tasks), strict=True))

    def _texts(self, name: str, embed: Callable[[], torch.Tensor]) -> torch.Tensor:
        tensors = self.store.arrays(name)
        if tensors is None:
            tensors = {"embeddings": embed()}
            self.store.keep_arrays(name, tensors)
        return tensors["embeddings"]


def _pool(seed: int, shared: bool) -> str:
    return f"{seed}" if shared else f"{seed}-unique"
