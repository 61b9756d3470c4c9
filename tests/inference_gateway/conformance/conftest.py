"""The engines that conform, each as a factory of an engine that has not been started."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from inference_gateway.engine.base import Engine, StepGuard
from seqr.plan import Plan
from tests.inference_gateway.support import OpenGuard, Reference, Resident, build_engine, resident

# A model directory, the plan to serve it under and the guard to ask -> an engine for 24 requests that takes prompts in
# chunks of at most 32 tokens.
Factory = Callable[[Path, Plan, StepGuard], Engine]


def transformers(**limits: Any) -> Factory:
    return lambda model_dir, plan, guard: build_engine(model_dir, plan, guard, **limits)


ENGINES: dict[str, Factory] = {
    "transformers": transformers(),
    "transformers-deterministic": transformers(deterministic=True),
    "transformers-prefix-sharing": transformers(prefix_sharing=True),
}
if torch.cuda.is_available():
    ENGINES["transformers-cuda-kernels"] = transformers(device="cuda", kernels=True)
    ENGINES["transformers-cuda-torch"] = transformers(device="cuda", kernels=False)
    ENGINES["transformers-cuda-prefix-sharing"] = transformers(device="cuda", prefix_sharing=True)


@pytest.fixture(params=list(ENGINES))
def make_engine(request: pytest.FixtureRequest, model_dir: Path, plan: Plan) -> Callable[..., Engine]:
    """An engine of each kind, with a guard that withdraws nothing unless another is given."""
    factory = ENGINES[request.param]
    return lambda guard=None: factory(model_dir, plan, guard or OpenGuard())


@pytest.fixture(scope="session")
def residents(plan: Plan) -> dict[str, Resident]:
    """Three silos, one of them with a second revision, and one that joins later."""
    drawn = {silo: resident(plan, silo, seed) for seed, silo in enumerate(("gamma", "alpha", "beta", "delta"))}
    return drawn | {"beta-2": resident(plan, "beta", 9, revision=2)}


@pytest.fixture(scope="session")
def reference(model_dir: Path, plan: Plan, residents: dict[str, Resident]) -> Reference:
    return Reference(model_dir, plan, [residents[silo] for silo in ("alpha", "beta", "gamma")])


@pytest.fixture(scope="session")
def later_reference(model_dir: Path, plan: Plan, residents: dict[str, Resident]) -> Reference:
    """After the changes: beta's second revision, gamma gone, delta there."""
    return Reference(model_dir, plan, [residents[name] for name in ("alpha", "beta-2", "delta")])
