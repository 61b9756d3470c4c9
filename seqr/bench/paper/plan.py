"""What a run measures, in which order: the comparison, router by router for every seed, then what explains it."""

from collections.abc import Callable, Sequence
from functools import partial

from seqr.bench.paper.evidence_study import RULES
from seqr.bench.paper.extras import Extras
from seqr.bench.paper.measuring import Measuring
from seqr.bench.paper.units import Unit
from seqr.bench.paper.workbench import Workbench, training_name

# Routers that are measured for every seed, beside the oracle, the base model and the evidence of the prompt; the
# strongest first, as a run that is cut short should have it.
PEERS = ("lorauter", "seqr", "lag", "arrow", "mu")
# Measured for the first seed: they explain, and are not in the comparison.
EXPLAINING = ("evidence", "seqr_public")
# SPECTR in its fair form chooses what SEQR chooses, as ``maximising`` checks pair by pair: only in the full run.
SAME_AS_SEQR = ("spectr",)


class Plan:
    """The units of a run. Costs are in tokens of a forward pass of the base model."""

    def __init__(self, bench: Workbench, every: bool = False, seeds: Sequence[int] = ()):
        """every: what only explains, and adapters with an A of their own, for every seed and not only the first.

        seeds: which of the run's seeds, in which order; all by default.
        """
        self.bench = bench
        self.measuring = Measuring(bench)
        self.extras = Extras(self.measuring)
        self._every = every
        self._seeds = tuple(seeds) or bench.settings.seeds
        self._units: list[Unit] = []

    def units(self) -> list[Unit]:
        """All units, in the order in which one process would do them."""
        self._units = []
        tasks, first = self.bench.settings.tasks, self.bench.settings.seeds[0]
        for task in tasks:
            self._answer("base", task, first, ())
        for seed in self._seeds:
            self._seed(seed)
        for router in PEERS:
            for seed in self._seeds:
                self._peer(router, seed)
        if first in self._seeds:
            for name, cost, after in self.extras.parts(first):
                self._kept(f"extra/{name}", cost, partial(self.extras.measure, name, first), after)
        for seed in self._seeds:
            if self._every or seed == first:
                self._explaining(seed)
        return self._units

    def _explaining(self, seed: int) -> None:
        tasks = self.bench.settings.tasks
        for router in EXPLAINING + (SAME_AS_SEQR if self._every else ()):
            for task in tasks:
                self._answer(router, task, seed, self._calibrated(seed))
        for task in tasks:
            self._train(task, seed, shared=False)
        for task in tasks:
            self._answer("unique_oracle", task, seed, self._trained(seed, shared=False))

    def _seed(self, seed: int) -> None:
        tasks, m = self.bench.settings.tasks, self.measuring
        for task in tasks:
            self._train(task, seed, shared=True)
        trained = self._trained(seed, shared=True)
        self._arrays(f"public/{seed}", 6_000, partial(m.public, seed), trained)
        for task in tasks:
            self._arrays(f"own/{seed}/{task}", 6_000, partial(m.own_moments, task, seed), trained)
            self._arrays(f"read/{seed}/{task}", self.bench.test_tokens(task), partial(m.norms, task, seed), trained)
        for task in tasks:
            self._answer("oracle", task, seed, trained)
        for task in tasks:
            after = (f"read/{seed}/{task}", f"public/{seed}", f"answer/base/all/{task}", f"answer/oracle/{seed}/{task}")
            for rule in RULES:
                name = self.measuring.answer_name(rule, task, seed)
                self._kept(name, 3_000, partial(self.extras.prompt_evidence, rule, task, seed), after)

    def _peer(self, router: str, seed: int) -> None:
        tasks, m = self.bench.settings.tasks, self.measuring
        if router == "lorauter":
            self._arrays(f"texts/tasks/{seed}", 6_000 * len(tasks), partial(m.task_vectors, seed), ())
            for task in tasks if seed == self._seeds[0] else ():
                self._arrays(f"texts/test/{task}", 6_000, partial(m.prompts, task), ())
        for task in tasks:
            texts = (f"texts/tasks/{seed}", f"texts/test/{task}") if router == "lorauter" else ()
            self._answer(router, task, seed, (*self._calibrated(seed), *texts))

    def _trained(self, seed: int, shared: bool) -> tuple[str, ...]:
        return tuple(training_name(task, seed, shared) for task in self.bench.settings.tasks)

    def _calibrated(self, seed: int) -> tuple[str, ...]:
        own = (f"own/{seed}/{task}" for task in self.bench.settings.tasks)
        return (f"public/{seed}", *own, *self._trained(seed, shared=True))

    def _train(self, task: str, seed: int, shared: bool) -> None:
        settings = self.bench.settings
        self._units.append(
            Unit(
                training_name(task, seed, shared),
                2.2 * settings.recipe.epochs * settings.train_rows * settings.max_tokens,
                partial(self.bench.is_trained, task, seed, shared),
                lambda: _discard(self.bench.adapter(task, seed, shared)),
                preparation=True,
            )
        )

    def _answer(self, router: str, task: str, seed: int, after: Sequence[str]) -> None:
        name = self.measuring.answer_name(router, task, seed)
        cost = 1.2 * self.bench.test_tokens(task)
        self._kept(name, cost, lambda: self.measuring.answered(router, task, seed), after)

    def _kept(self, name: str, cost: float, work: Callable[[], object], after: Sequence[str]) -> None:
        store = self.bench.store
        self._units.append(Unit(name, cost, lambda: store.has_result(name), lambda: _discard(work()), tuple(after)))

    def _arrays(self, name: str, cost: float, work: Callable[[], object], after: Sequence[str]) -> None:
        done, kept = partial(self.bench.store.has_arrays, name), lambda: _discard(work())
        self._units.append(Unit(name, cost, done, kept, tuple(after), preparation=True))


def _discard(_value: object) -> None:
    return None
