"""Which routers pick the adapter of largest activation norm (SEQR paper, section 4.4 and figure 4)."""

from typing import Any

import torch

from seqr.bench.paper.measuring import Measuring
from seqr.routers.interface import Activation, Batch, Router
from seqr.routers.lag import LagRouter
from seqr.routers.mixture_model import MixtureModel, hidden_states
from seqr.routers.norms import r_factors
from seqr.routing.scores import choose

ROWS = 12  # per task: every one of its tokens and modules is checked in fp64


def maximiser_shares(measuring: Measuring, seed: int) -> dict[str, Any]:
    """The share of (token, module) pairs at which each router's choice is the fp64 one, on the base model's states.

    The truth is the argmax over i of (||R_i z|| - mu_i) / sigma_i in fp64, with z as computed, R in fp32 as an adapter
    holds it, and the paper's own-data mu and sigma; LAG is shown for every k.
    """
    bench = measuring.bench
    pool, statistics = bench.pool(seed), measuring.own_statistics(seed)
    routers: dict[str, Router] = {name: measuring.router(name, seed) for name in ("seqr", "spectr", "arrow")}
    for k in range(1, len(pool) + 1):
        routers[f"lag {k}"] = LagRouter(pool, k, statistics, measuring.spectrum(seed))
    factors = [r_factors(pool, module) for module in range(len(pool.modules))]
    agreed, total = dict.fromkeys(routers, 0), 0
    prompts = [e.prompt for task in bench.settings.tasks for e in bench.test_examples(task)[:ROWS]]
    mixed = MixtureModel(bench.model, pool)

    def observe(activation: Activation) -> None:
        nonlocal total
        speaks = batch.speaks
        z = activation.z.double()
        norms = torch.stack([(z @ r.T).square().sum(1).sqrt() for r in factors[activation.module]], 1)
        score = (norms - statistics.mu[activation.module]) / statistics.sigma[activation.module]
        truth = choose(score, batch.allowed)[speaks]
        total += int(speaks.sum())
        for name, router in routers.items():
            agreed[name] += int((router.route(activation).columns[speaks, 0] == truth).sum())

    try:
        for start in range(0, len(prompts), 24):
            batch, ids = Batch.of(prompts[start : start + 24], len(pool), bench.pad_token)
            for router in routers.values():
                router.begin(batch)
            with torch.inference_mode(), mixed.observed(observe):
                hidden_states(bench.model, ids, batch)
    finally:
        mixed.close()
    return {"pairs": total, "agreed": agreed, "share": {name: count / total for name, count in agreed.items()}}
