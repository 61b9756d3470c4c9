"""What explains the comparison, for one seed: parts of evidence, noise, norms, forbidden silos, large libraries."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from seqr.bench.machine import device_name
from seqr.bench.paper.distractors import distractor_study
from seqr.bench.paper.evidence_study import ABLATIONS, RULES, Variant, chosen, evidence
from seqr.bench.paper.maximising import maximiser_shares
from seqr.bench.paper.measuring import Measuring
from seqr.bench.paper.reading import read
from seqr.bench.paper.regimes import REGIMES, regime
from seqr.bench.paper.routed import run
from seqr.routers.seqr import SeqrRouter
from seqr.routers.statistics import Statistics

Json = dict[str, Any]
NOISE = (0.0, 0.1, 0.2, 0.5, 1.0)
NOISE_ROWS = 30
UNIQUE_ROWS = 40
THRESHOLDS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)


class Extras:
    """One method per part; ``parts`` says in which order and what each needs."""

    def __init__(self, measuring: Measuring):
        self.m = measuring
        self.bench = measuring.bench

    def parts(self, seed: int) -> list[tuple[str, float, tuple[str, ...]]]:
        """(name, cost in tokens, units it needs) of every part."""
        tasks = self.bench.settings.tasks
        read_all = (f"public/{seed}", *(f"{kind}/{seed}/{task}" for kind in ("own", "read") for task in tasks))
        answered = tuple(self.m.answer_name(router, task, seed) for router in ("oracle", "base") for task in tasks)
        trained = tuple(f"train/{seed}/{task}/unique" for task in tasks)
        texts = (f"texts/tasks/{seed}", *(f"texts/test/{task}" for task in tasks))
        passes = float(sum(self.bench.test_tokens(task) for task in tasks))
        return [
            ("ablations", 1_000, read_all),
            ("norms", 1_000, read_all),
            ("maximising", 20_000, read_all),
            ("distractors", passes / 2, (*read_all, *answered)),
            ("forbidden", passes, (*read_all, *answered)),
            ("noise", passes, (*read_all, *answered)),
            *((f"regime-{name}", 1.5 * passes, (*read_all, *answered, *texts)) for name in REGIMES),
            ("unique-norms", 30_000, trained),
        ]

    def measure(self, name: str, seed: int) -> Json:
        """The part called ``name``, from the store or measured now."""
        value = self.bench.store.result(f"extra/{name}")
        if value is None:
            if name.startswith("regime-"):
                value = regime(self.m, seed, name.removeprefix("regime-"))
            else:
                methods: dict[str, Callable[[int], Json]] = {
                    "ablations": self.ablations, "maximising": partial(maximiser_shares, self.m), "norms": self.norms,
                    "unique-norms": self.unique_norms,
                    "distractors": partial(distractor_study, self.m), "forbidden": self.forbidden, "noise": self.noise,
                }  # fmt: skip
                value = methods[name](seed)
            self.bench.store.keep(f"extra/{name}", value)
        return dict(value)

    def prompt_evidence(self, router: str, task: str, seed: int) -> Json:
        """right, share, predicted as ``Measuring.answered``, and the adapter that each prompt spoke for.

        router: one of ``RULES``.
        """
        name = self.m.answer_name(router, task, seed)
        value = self.bench.store.result(name)
        if value is None:
            statistics, rows = self.m.public_statistics(seed), len(self.bench.test_examples(task))
            columns = chosen(evidence(self.m.norms(task, seed), statistics, RULES[router], rows))
            own = self.bench.settings.tasks.index(task)
            predicted = self.m.given(task, seed, columns)
            gold = [e.gold for e in self.bench.test_examples(task)]
            value = {
                "right": [int(p == g) for p, g in zip(predicted, gold, strict=True)],
                "share": [float(column == own) for column in columns],
                "predicted": predicted,
                "columns": columns,
                "device": device_name(),
            }
            self.bench.store.keep(name, value)
        return dict(value)

    def ablations(self, seed: int) -> Json:
        """The share of prompts whose own adapter comes first, by variant and task."""
        out: Json = {}
        for label, variant in ABLATIONS.items():
            out[label] = self._shares(seed, variant, variant.calibrated(self.m.public(seed)))
        out["own-data mu and sigma"] = self._shares(seed, Variant(), self.m.own_statistics(seed))
        return out

    def norms(self, seed: int) -> Json:
        """Figures 2 and 3: mean norm of every adapter on every task, raw and calibrated, where A is shared."""
        own, public = self.m.own_statistics(seed), self.m.public_statistics(seed)
        out: Json = {"raw": [], "own": [], "public": []}
        for task in self.bench.settings.tasks:
            norms = self.m.norms(task, seed).norms.to(torch.float64)
            out["raw"].append(norms.mean((0, 1)).tolist())
            out["own"].append(((norms - own.mu) / own.sigma).mean((0, 1)).tolist())
            out["public"].append(((norms - public.mu) / public.sigma).mean((0, 1)).tolist())
        return out

    def unique_norms(self, seed: int) -> Json:
        """The same on some rows, for adapters that have an A each."""
        pool, own = self.bench.pool(seed, False), self.m.own_statistics(seed, False)
        out: Json = {"raw": [], "own": []}
        for task in self.bench.settings.tasks:
            prompts = [e.prompt for e in self.bench.test_examples(task)[:UNIQUE_ROWS]]
            norms = read(self.bench.model, pool, prompts, self.bench.pad_token).norms.to(torch.float64)
            out["raw"].append(norms.mean((0, 1)).tolist())
            out["own"].append(((norms - own.mu) / own.sigma).mean((0, 1)).tolist())
        return out

    def forbidden(self, seed: int) -> Json:
        """Each task's own silo forbidden: the answers of whoever is chosen then, and with a threshold below which
        nobody is; beside them what the threshold costs where nothing is forbidden."""
        out: Json = {"tasks": {}}
        for own, task in enumerate(self.bench.settings.tasks):
            value = self._evidence(task, seed)
            gold = [e.gold for e in self.bench.test_examples(task)]
            entry: Json = {}
            for label, threshold in [("always", None), *((str(t), t) for t in THRESHOLDS)]:
                for case, without in (("forbidden", own), ("permitted", None)):
                    columns = chosen(value, without, threshold)
                    predicted = self.m.given(task, seed, columns)
                    entry.setdefault(case, {})[label] = {
                        "right": [int(p == g) for p, g in zip(predicted, gold, strict=True)],
                        "nobody": sum(c < 0 for c in columns) / len(columns),
                    }
            out["tasks"][task] = entry
        return out

    def noise(self, seed: int) -> Json:
        """Figure 6: accuracy when every mu is off by Gaussian noise of so many sigma."""
        out: Json = {"rows": NOISE_ROWS, "seqr": {}, "prompt_evidence": {}}
        own, public = self.m.own_statistics(seed), self.m.public_statistics(seed)
        for intensity in NOISE:
            router = SeqrRouter(self.bench.pool(seed), own.shifted(intensity, seed))
            token, prompt = {}, {}
            for column, task in enumerate(self.bench.settings.tasks):
                examples = self.bench.test_examples(task)
                few = examples[:NOISE_ROWS]
                answers = run(self.bench.model, router, few, column, self.bench.pad_token).predicted
                token[task] = _accuracy(answers, [e.gold for e in few])
                columns = chosen(self._evidence(task, seed, public.shifted(intensity, seed)))
                prompt[task] = _accuracy(self.m.given(task, seed, columns), [e.gold for e in examples])
            out["seqr"][str(intensity)], out["prompt_evidence"][str(intensity)] = token, prompt
        return out

    def _evidence(self, task: str, seed: int, statistics: Statistics | None = None) -> torch.Tensor:
        statistics = statistics or self.m.public_statistics(seed)
        return evidence(self.m.norms(task, seed), statistics, rows=len(self.bench.test_examples(task)))

    def _shares(self, seed: int, variant: Variant, statistics: Statistics) -> dict[str, float]:
        shares = {}
        for own, task in enumerate(self.bench.settings.tasks):
            columns = chosen(evidence(self.m.norms(task, seed), statistics, variant))
            shares[task] = sum(column == own for column in columns) / len(columns)
        return shares


def _accuracy(predicted: Sequence[int], gold: Sequence[int]) -> float:
    return sum(p == g for p, g in zip(predicted, gold, strict=True)) / len(gold)
