"""What a run measures, in which order: everything for the first seed, then the comparison for the others."""

from collections.abc import Callable, Sequence
from functools import partial

from seqr.bench.paper.evidence_study import RULES
from seqr.bench.paper.extras import Extras
from seqr.bench.paper.measuring import Measuring
from seqr.bench.paper.units import Unit
from seqr.bench.paper.workbench import Workbench

# Routers that are measured for every seed, beside the oracle, the base model and the evidence of the prompt.
PEERS = ("seqr", "lag", "arrow", "mu", "lorauter")
# Measured for the first seed: they explain, and are not in the comparison.
EXPLAINING = ("evidence", "seqr_public")
# SPECTR in its fair form chooses what SEQR chooses, as ``maximising`` checks pair by pair: only in the full run.
SAME_AS_SEQR = ("spectr",)


class Plan:
    """The units of a run. Costs are in tokens of a forward pass of the base model."""

    def __init__(self, bench: Workbench, every: bool = False):
        """every: the explaining routers and the extras for every seed, too."""
        self.bench = bench
        self.measuring = Measuring(bench)
        self.extras = Extras(self.measuring)
        self._every = every
        self._units: list[Unit] = []

    def units(self) -> list[Unit]:
        """All units, in the order in which one process would do them."""
        self._units = []
        tasks, (first, *others) = self.bench.settings.tasks, self.bench.settings.seeds
        self._seed(first)
        for name, cost, after in self.extras.parts(first):
            self._kept(f"extra/{name}", cost, partial(self.extras.measure, name, first), after)
        self._explaining(first)
        for task in tasks:
            self._train(task, first, shared=False)
        for task in tasks:
            self._answer("unique_oracle", task, first, self._trained(first, shared=False))
        for seed in others:
            self._seed(seed)
            if self._every:
                self._explaining(seed)
        return self._units

    def _explaining(self, seed: int) -> None:
        for router in EXPLAINING + (SAME_AS_SEQR if self._every else ()):
            for task in self.bench.settings.tasks:
                self._answer(router, task, seed, self._calibrated(seed))

    def _seed(self, seed: int) -> None:
        tasks, m = self.bench.settings.tasks, self.measuring
        for task in tasks:
            self._train(task, seed, shared=True)
        trained = self._trained(seed, shared=True)
        self._arrays(f"public/{seed}", 6_000, partial(m.public, seed), trained)
        for task in tasks:
            self._arrays(f"own/{seed}/{task}", 6_000, partial(m.own_moments, task, seed), trained)
            prompts = sum(len(e.prompt) for e in self.bench.test_examples(task))
            self._arrays(f"read/{seed}/{task}", prompts, partial(m.norms, task, seed), trained)
        if seed == self.bench.settings.seeds[0]:
            for task in tasks:
                self._answer("base", task, seed, ())
        for task in tasks:
            self._answer("oracle", task, seed, trained)
        for task in tasks:
            after = (f"read/{seed}/{task}", f"public/{seed}", f"answer/base/all/{task}", f"answer/oracle/{seed}/{task}")
            for rule in RULES:
                name = self.measuring.answer_name(rule, task, seed)
                self._kept(name, 3_000, partial(self.extras.prompt_evidence, rule, task, seed), after)
        for router in PEERS:
            for task in tasks:
                self._answer(router, task, seed, self._calibrated(seed))

    def _trained(self, seed: int, shared: bool) -> tuple[str, ...]:
        return tuple(f"train/{seed}/{task}/{_kind(shared)}" for task in self.bench.settings.tasks)

    def _calibrated(self, seed: int) -> tuple[str, ...]:
        return (f"public/{seed}", *(f"own/{seed}/{task}" for task in self.bench.settings.tasks))

    def _train(self, task: str, seed: int, shared: bool) -> None:
        examples = self.bench.train_examples(task, seed)
        cost = (
            2.2 * self.bench.settings.recipe.epochs * sum(len(e.prompt) + len(e.candidates[e.gold]) for e in examples)
        )
        recipe = self.bench.recipe_of(task, seed, shared)
        self._units.append(
            Unit(
                f"train/{seed}/{task}/{_kind(shared)}", cost, lambda: self.bench.store.has_adapter(recipe),
                lambda: _discard(self.bench.adapter(task, seed, shared)),
            )
        )  # fmt: skip

    def _answer(self, router: str, task: str, seed: int, after: Sequence[str]) -> None:
        examples = self.bench.test_examples(task)
        cost = 1.2 * sum(len(s) for e in examples for s in _sequences(e.prompt, e.candidates))
        name = self.measuring.answer_name(router, task, seed)
        self._kept(name, cost, lambda: self.measuring.answered(router, task, seed), after)

    def _kept(self, name: str, cost: float, work: Callable[[], object], after: Sequence[str]) -> None:
        store = self.bench.store
        self._units.append(Unit(name, cost, lambda: store.has_result(name), lambda: _discard(work()), tuple(after)))

    def _arrays(self, name: str, cost: float, work: Callable[[], object], after: Sequence[str]) -> None:
        store = self.bench.store
        self._units.append(Unit(name, cost, lambda: store.has_arrays(name), lambda: _discard(work()), tuple(after)))


def _sequences(prompt: tuple[int, ...], candidates: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return [prompt + c[:-1] for c in candidates if len(c) > 1] or [prompt]


def _kind(shared: bool) -> str:
    return "shared" if shared else "unique"


def _discard(_value: object) -> None:
    return None
