"""A run's results as numbers, from whatever has been measured so far: for report, figures and ``results.json``."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from seqr.bench.paper.comparing import Float64, bootstrap_interval, paired_p, wilson
from seqr.bench.paper.flops import paper_table
from seqr.bench.paper.workbench import Workbench, training_name

COMPARED = (
    "base",
    "mu",
    "arrow",
    "lag",
    "seqr",
    "seqr_public",
    "evidence",
    "lorauter",
    "even_evidence",
    "early_evidence",
    "prompt_evidence",
    "oracle",
)
# The method whose difference from every other one is tested.
OURS = "prompt_evidence"
PUBLISHED = ("mu", "arrow", "lag", "seqr", "lorauter")
PARTS: tuple[str, ...] = ("ablations", "maximising", "norms", "unique-norms", "distractors", "forbidden", "noise")
PARTS += ("regime-lorauter-semi", "regime-lorauter-ood", "regime-seqr-ood")


@dataclass(frozen=True)
class Row:
    """One router in the main table.

    percent: percent of the oracle per task, the mean over its seeds; deviation: over seeds, where there are two or
    more; average, interval: the mean over tasks and its 95% bootstrap interval over rows; share: the own adapter's part
    of all (token, module) choices; p: of the paired test against ``OURS``.
    """

    router: str
    seeds: int
    percent: dict[str, float]
    deviation: dict[str, float]
    average: float
    interval: tuple[float, float]
    share: float | None
    p: float | None


class Summary:
    """Reads the store of a run; what is missing is left out, never guessed."""

    def __init__(self, bench: Workbench, unnamed: str = "cpu"):
        """unnamed: the device of results that do not say which one they were measured on, as old ones do not."""
        self._unnamed = unnamed
        self.settings = bench.settings
        self.tasks = bench.settings.tasks
        self.store = bench.store
        self.model_name = bench.model_name
        self.base_digest = bench.digest

    def rights(self, router: str, seed: int) -> dict[str, Float64] | None:
        """1 or 0 per test row and task for one seed; None unless every task has been measured."""
        out: dict[str, Float64] = {}
        for task in self.tasks:
            value = self._answered(router, seed, task)
            if value is None:
                return None
            out[task] = np.asarray(value["right"], dtype=np.float64)
        return out

    def devices(self) -> dict[int, dict[str, list[str]]]:
        """By seed, the devices that "trained" its adapters and that its answers were "measured" on, where any was."""
        out: dict[int, dict[str, list[str]]] = {}
        for seed in self.settings.seeds:
            trained, measured = set(), set()
            for task in self.tasks:
                for router in (*COMPARED[1:], "unique_oracle"):
                    if (value := self._answered(router, seed, task)) is not None:
                        measured.add(value.get("device", self._unnamed))
                for shared in (True, False):
                    if (value := self.store.result(training_name(task, seed, shared))) is not None:
                        trained.add(value["device"])
            if measured:
                out[seed] = {"trained": sorted(trained or measured), "measured": sorted(measured)}
        return out

    def seeds(self, router: str) -> list[int]:
        """The seeds for which a router and the oracle have been measured on every task."""
        return [s for s in self.settings.seeds if self.rights(router, s) is not None and self.rights("oracle", s)]

    def main_table(self) -> list[Row]:
        """Table 3: every router that has been measured for at least one seed."""
        return [row for row in (self._row(router) for router in COMPARED) if row is not None]

    def oracle_scores(self) -> dict[str, dict[str, Any]]:
        """Tables 2 and 4: accuracy with the right adapter, mean over seeds, with rows and a 95% interval."""
        out: dict[str, dict[str, Any]] = {}
        for router in ("base", "oracle", "unique_oracle"):
            seeds = [s for s in self.settings.seeds if self.rights(router, s) is not None]
            if not seeds:
                continue
            out[router] = {"seeds": len(seeds)}
            for task in self.tasks:
                each = [self._of(router, seed)[task] for seed in seeds]
                rows = int(each[0].size)
                mean = float(np.mean([one.mean() for one in each]))
                # Seeds share their test rows: the interval is of one seed's rows, not of all together.
                low, high = wilson(round(mean * rows), rows)
                out[router][task] = {"accuracy": mean, "rows": rows, "low": low, "high": high}
            out[router]["average"] = float(np.mean([out[router][task]["accuracy"] for task in self.tasks]))
        return out

    def extra(self, name: str) -> Any:
        """One part of ``extras``, or None."""
        return self.store.result(f"extra/{name}")

    def as_json(self) -> dict[str, Any]:
        """Everything, for ``results.json``; of single rows' answers their accuracy."""
        return {
            "devices": self.devices(), "model": self.model_name, "model_digest": self.base_digest,
            "tasks": list(self.tasks), "seeds": list(self.settings.seeds), "train_rows": self.settings.train_rows,
            "test_rows": self.settings.test_rows, "max_tokens": self.settings.max_tokens,
            "recipe": self.settings.recipe.described(), "table3": [vars(row) for row in self.main_table()],
            "table4": self.oracle_scores(), "flops": paper_table(),
            "extras": {name: _accuracies(value) for name in PARTS if (value := self.extra(name)) is not None},
        }  # fmt: skip

    def _row(self, router: str) -> Row | None:
        seeds = self.seeds(router)
        if not seeds:
            return None
        by_task: dict[str, list[float]] = {task: [] for task in self.tasks}
        for seed in seeds:
            right, oracle = self._of(router, seed), self._of("oracle", seed)
            for task in self.tasks:
                by_task[task].append(100 * right[task].mean() / max(oracle[task].mean(), 1e-9))
        percent = {task: float(np.mean(values)) for task, values in by_task.items()}
        deviation = {task: float(np.std(values)) for task, values in by_task.items() if len(values) > 1}
        scaled = self._scaled(router, seeds)
        p = None
        if router != OURS and (common := [s for s in seeds if s in self.seeds(OURS)]):
            ours, theirs = self._scaled(OURS, common), self._scaled(router, common)
            p = paired_p([a - b for a, b in zip(ours, theirs, strict=True)])
        return Row(
            router, len(seeds), percent, deviation, float(np.mean(list(percent.values()))),
            bootstrap_interval(scaled), self._share(router, seeds), p,
        )  # fmt: skip

    def _scaled(self, router: str, seeds: list[int]) -> list[Float64]:
        """Per task: each row's percent of oracle, averaged over seeds."""
        out = []
        for task in self.tasks:
            each = [100 * self._of(router, s)[task] / max(self._of("oracle", s)[task].mean(), 1e-9) for s in seeds]
            out.append(np.mean(each, axis=0))
        return out

    def _share(self, router: str, seeds: list[int]) -> float | None:
        if router in ("base", "oracle"):
            return None
        return float(
            np.mean([np.mean((self._answered(router, s, t) or {})["share"]) for s in seeds for t in self.tasks])
        )

    def _of(self, router: str, seed: int) -> dict[str, Float64]:
        found = self.rights(router, seed)
        if found is None:
            raise KeyError(f"{router} has not been measured for seed {seed}")
        return found

    def _answered(self, router: str, seed: int, task: str) -> dict[str, Any] | None:
        value: dict[str, Any] | None = self.store.result(
            f"answer/{router}/{'all' if router == 'base' else seed}/{task}"
        )
        return value


def _accuracies(value: Any) -> Any:
    """``value`` with the mean in the place of every "right", a list with one 0 or 1 per row."""
    if not isinstance(value, dict):
        return value
    return {name: float(np.mean(part)) if name == "right" else _accuracies(part) for name, part in value.items()}
