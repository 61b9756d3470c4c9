"""An engine that routes with the GPU's kernels answers as one without them; in Triton's interpreter on a CPU."""

import asyncio
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inference_gateway.engine.base import AdapterKey, Failed, Finished, GenerationRequest, Tokens, TokenShares
from inference_gateway.engine.transformers_engine import EngineLimits, TransformersEngine
from inference_gateway.errors import EngineIncompatible
from seqr.keys import SealingKey, SigningKey
from seqr.plan import Plan
from tests.inference_gateway.support import (
    Gateway,
    Reference,
    Resident,
    ask,
    build_engine,
    make_plan,
    prompts,
    resident,
    serve,
)
from tests.seqr.kernels.conftest import reason_to_skip

pytestmark = pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip() or "it can run")

MODES = ("prompt_evidence", "evidence", "per_token")
SILOS = ("gamma", "alpha", "beta")


@pytest.fixture(scope="module")
def plan(model_dir: Path) -> Plan:
    """Over the attention alone: half the sites, half the time."""
    return make_plan(model_dir, Gateway(SealingKey.generate(), SigningKey.generate()), "attention")


@pytest.fixture(scope="module")
def residents(plan: Plan) -> list[Resident]:
    return [resident(plan, silo, seed) for seed, silo in enumerate(SILOS)]


def steps_by_kernels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each step that the kernels take from here on."""
    from inference_gateway.engine import kernel_routing

    taken: list[int] = []
    make: Callable[..., Any] = kernel_routing.device_step

    def noting(*args: Any) -> Any:
        taken.append(args[-1])
        return make(*args)

    monkeypatch.setattr(kernel_routing, "device_step", noting)
    return taken


def test_mixed_users_with_chunked_prefill_get_the_tokens_of_the_slow_reference(
    monkeypatch: pytest.MonkeyPatch, model_dir: Path, plan: Plan, residents: list[Resident]
) -> None:
    taken = steps_by_kernels(monkeypatch)
    reference = Reference(model_dir, plan, residents)
    keys = {one.key.silo_id: one.key for one in residents}
    sets: tuple[tuple[str, ...], ...] = (SILOS, ("alpha", "gamma"), ("beta",), ())
    asked = [(text, sets[i % 4], MODES[i % 3]) for i, text in enumerate(prompts(6, seed=3, longest=24))]
    expected = [reference.answer(text, silos, mode, 3) for text, silos, mode in asked]

    async def use(engine: TransformersEngine) -> list[list[int]]:
        jobs = [
            ask(engine, f"r{i}", text, [keys[silo] for silo in silos], mode, 3)
            for i, (text, silos, mode) in enumerate(asked)
        ]
        return [answer.tokens for answer in await asyncio.gather(*jobs)]

    assert serve(model_dir, plan, use, residents, kernels=True, max_batch_tokens=16) == expected
    assert len(taken) > 4 and max(taken) > 1


def test_a_swap_and_a_revocation_in_the_middle_change_the_tables_between_two_steps(
    model_dir: Path, plan: Plan, residents: list[Resident]
) -> None:
    later = resident(plan, "beta", 9, revision=2)

    async def use(engine: TransformersEngine) -> list[Any]:
        stays = asyncio.create_task(ask(engine, "stays", range(5, 20), [residents[1].key], "evidence", 12))
        goes = asyncio.create_task(ask(engine, "goes", range(5, 20), [residents[0].key], "evidence", 400))
        while engine.info().generated_tokens < 4:
            await asyncio.sleep(0.01)
        await engine.load(later.key, later.adapter, later.statistics)
        await engine.revoke(residents[0].key)
        new = await ask(engine, "new", range(30, 40), [later.key, residents[1].key], "per_token", 5)
        return [await stays, (await goes).end, new]

    (stays, gone, new), (plain, _, also) = (
        serve(model_dir, plan, use, residents, kernels=kernels) for kernels in (True, False)
    )
    assert isinstance(gone, Failed) and gone.code == "adapter_replaced"
    assert (stays.tokens, new.tokens) == (plain.tokens, also.tokens) and isinstance(stays.end, Finished)


@pytest.mark.parametrize("mode", MODES)
def test_attribution_is_that_of_the_plain_engine(
    monkeypatch: pytest.MonkeyPatch, model_dir: Path, plan: Plan, residents: list[Resident], mode: str
) -> None:
    """A prompt_evidence answer's steps are the kernels'; where a margin is told, the plain layers find it."""
    taken = steps_by_kernels(monkeypatch)

    async def use(engine: TransformersEngine) -> tuple[list[TokenShares], Any]:
        told: list[TokenShares] = []
        keys = frozenset(one.key for one in residents)
        request = GenerationRequest("r", tuple(range(7, 27)), 4, keys, mode, attribution=True)
        async for event in engine.generate(request):
            if isinstance(event, Tokens):
                told.extend(event.shares)
        assert isinstance(event, Finished)
        return told, event.shares

    (told, total), (plain, also) = (
        serve(model_dir, plan, use, residents, kernels=kernels) for kernels in (True, False)
    )
    assert total == also
    assert [(one.counts, one.choices) for one in told] == [(one.counts, one.choices) for one in plain]
    assert [one.margin for one in told] == pytest.approx([one.margin for one in plain])
    assert bool(taken) == (mode == "prompt_evidence")


def test_a_prefix_that_the_kernels_computed_is_shared(model_dir: Path, plan: Plan, residents: list[Resident]) -> None:
    keys: list[AdapterKey] = [one.key for one in residents]

    async def use(engine: TransformersEngine) -> tuple[list[int], list[int], int]:
        first = await ask(engine, "a", range(3, 43), keys, "per_token", 4)
        again = await ask(engine, "b", range(3, 43), keys, "per_token", 4)
        return first.tokens, again.tokens, engine.info().prefix_hits

    first, again, hits = serve(model_dir, plan, use, residents, kernels=True, prefix_sharing=True)
    assert first == again and hits == 32


def test_a_revoked_adapter_leaves_the_kernels_tables(model_dir: Path, plan: Plan, residents: list[Resident]) -> None:
    async def use(engine: TransformersEngine) -> list[Any]:
        await ask(engine, "a", range(3, 9), [one.key for one in residents], "per_token", 2)
        assert engine._residents.kernels is not None
        held = [weakref.ref(table.b_t) for table in engine._residents.kernels.tables]
        await engine.revoke(residents[0].key)
        gc.collect()
        return [reference() for reference in held]

    assert serve(model_dir, plan, use, residents, kernels=True) == [None] * 4


def test_deterministic_serving_does_not_route_with_kernels(model_dir: Path, plan: Plan) -> None:
    with pytest.raises(EngineIncompatible, match="deterministic serving cannot route with kernels"):
        build_engine(model_dir, plan, kernels=True, deterministic=True)
    assert EngineLimits().kernels is None
    assert build_engine(model_dir, plan)._residents.kernels is None  # on a CPU, unless asked for
