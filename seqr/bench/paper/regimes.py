"""LORAUTER's regimes: what each router makes of a task whose own adapter is withheld.

non-OOD: everything is there, the main comparison. semi-OOD: the adapter is gone and the server still has the task's
data, so that LORAUTER can look for a substitute. OOD: both are gone.
"""

from typing import Any

import torch

from seqr.bench.paper.measuring import Measuring
from seqr.bench.paper.routed import run, with_columns
from seqr.routers.interface import Router
from seqr.routers.lorauter import LorauterRouter, successive_halving

REGIMES = ("lorauter-semi", "lorauter-ood", "seqr-ood")
VALIDATION_ROWS = 32


def regime(measuring: Measuring, seed: int, name: str) -> dict[str, Any]:
    """right per task and row under one of ``REGIMES``; for lorauter-semi also the substitute of each task."""
    bench = measuring.bench
    out: dict[str, Any] = {"tasks": {}, "substitutes": {}}
    for own, task in enumerate(bench.settings.tasks):
        examples = bench.test_examples(task)
        permitted = torch.ones(len(examples), len(bench.pool(seed)), dtype=torch.bool)
        permitted[:, own] = False
        router: Router
        measuring.remember(task)
        if name == "lorauter-semi":
            substitute = find_substitute(measuring, seed, task)
            out["substitutes"][task] = substitute
            adapter_of = {t: t for t in bench.settings.tasks} | {task: substitute}
            router = LorauterRouter(bench.pool(seed), measuring.encoder, measuring.task_vectors(seed), adapter_of)
        else:
            router = measuring.router(name.removesuffix("-ood"), seed)
        predicted = run(bench.model, router, examples, own, bench.pad_token, permitted).predicted
        out["tasks"][task] = {"right": [int(p == e.gold) for p, e in zip(predicted, examples, strict=True)]}
    return out


def find_substitute(measuring: Measuring, seed: int, task: str) -> str:
    """The adapter of another task that serves ``task`` best on its training rows, by successive halving."""
    bench = measuring.bench
    examples = bench.train_examples(task, seed)[:VALIDATION_ROWS]

    def accuracy(name: str, rows: int) -> float:
        few = examples[:rows]
        column = bench.settings.tasks.index(name)
        predicted = with_columns(bench.model, bench.pool(seed), few, [column] * len(few), bench.pad_token)
        return sum(p == e.gold for p, e in zip(predicted, few, strict=True)) / len(few)

    others = [name for name in bench.settings.tasks if name != task]
    return successive_halving(others, accuracy, len(examples))
