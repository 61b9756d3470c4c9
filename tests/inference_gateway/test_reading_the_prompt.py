"""Before an answer that more than one silo may shape, the base model reads the prompt: a pass of its own."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from inference_gateway.engine.base import Failed, Finished, GenerationRequest
from inference_gateway.engine.sequences import READING
from inference_gateway.engine.stepper import Output
from inference_gateway.engine.transformers_engine import TransformersEngine
from seqr.plan import Plan
from seqr.step import StepContext
from tests.inference_gateway.support import OpenGuard, Resident, Use, ask, prompts, resident, serve

PROMPT = prompts(1)[0] + prompts(1, seed=1)[0]
BUDGET = 32  # tokens per step: the prompt takes several


@pytest.fixture
def residents(plan: Plan) -> list[Resident]:
    return [resident(plan, "alpha", 1), resident(plan, "beta", 2)]


def in_small_steps(model_dir: Path, plan: Plan, residents: list[Resident], use: Use, guard: Any = None) -> Any:
    return serve(model_dir, plan, use, residents, guard=guard, max_batch_tokens=BUDGET, max_concurrent=4)


def request(residents: list[Resident], request_id: str = "mine") -> GenerationRequest:
    keys = frozenset(one.key for one in residents)
    return GenerationRequest(request_id, tuple(PROMPT), 8, keys, "prompt_evidence", attribution=True)


async def while_reading(engine: TransformersEngine, one: GenerationRequest, act: Callable[[], Awaitable[Any]]) -> Any:
    """Start ``one``, do ``act`` when its prompt is half read, and return the last event."""
    halfway, loop = asyncio.Event(), asyncio.get_running_loop()
    begin = engine.steps.begin

    def spy(batch: Any) -> Any:
        if any(s.request_id == one.request_id + READING and s.position > 0 for s in batch.slices):
            loop.call_soon_threadsafe(halfway.set)
        return begin(batch)

    engine.steps.begin = spy  # type: ignore[method-assign]

    async def go() -> Any:
        last = None
        async for event in engine.generate(one):
            last = event
        return last

    asking = asyncio.create_task(go())
    await halfway.wait()
    await act()
    return await asking


def test_reading_is_done_by_the_base_model_and_the_answer_by_one_silo(
    model_dir: Path, plan: Plan, residents: list[Resident]
) -> None:
    async def use(engine: TransformersEngine) -> Any:
        begin, seen = engine.steps.begin, []

        def spy(batch: Any) -> Any:
            step = begin(batch)
            seen.append((batch.slices[0].request_id, step))
            return step

        engine.steps.begin = spy  # type: ignore[method-assign]
        answer = await ask(engine, "mine", PROMPT, [r.key for r in residents], attribution=True)
        return answer, seen, engine.info()

    answer, seen, info = in_small_steps(model_dir, plan, residents, use)
    steps = {
        name: [s for n, s in seen if n == name and isinstance(s, StepContext)] for name in ("mine/reading", "mine")
    }
    assert len(steps["mine/reading"]) == -(-len(PROMPT) // BUDGET)
    assert not any(int(step.choice_counts(range(step.tokens)).sum()) for step in steps["mine/reading"])
    assert len(answer.end.shares.total) == 1
    assert answer.end.shares.choices == (len(PROMPT) + len(answer.tokens) - 1) * len(plan.modules)
    assert (info.prompt_tokens, info.generated_tokens) == (len(PROMPT), len(answer.tokens))


def test_where_one_silo_at_most_may_answer_nothing_is_read_twice(
    model_dir: Path, plan: Plan, residents: list[Resident]
) -> None:
    async def use(engine: TransformersEngine) -> list[int]:
        steps = [engine.info().steps]
        for i, keys in enumerate(([], [residents[0].key], [r.key for r in residents])):
            await ask(engine, f"r{i}", PROMPT, keys, max_tokens=1)
            steps.append(engine.info().steps)
        return [after - before for before, after in pairwise(steps)]

    chunks = -(-len(PROMPT) // BUDGET)
    assert in_small_steps(model_dir, plan, residents, use) == [chunks, chunks, 2 * chunks]


def test_an_asker_who_leaves_while_the_prompt_is_read_leaves_nothing_behind(
    model_dir: Path, plan: Plan, residents: list[Resident]
) -> None:
    async def use(engine: TransformersEngine) -> Any:
        for name in (f"r{i}" for i in range(8)):  # as many as there are slots for evidence
            left = asyncio.Event()

            async def leave(name: str = name, left: asyncio.Event = left) -> None:
                await engine.abort(name)
                left.set()

            asking = asyncio.create_task(while_reading(engine, request(residents, name), leave))
            await left.wait()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(asking), 0.1)  # nobody is told: whoever aborts has left
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        after = await ask(engine, "next", PROMPT, [r.key for r in residents])
        return engine.info().running, after

    running, after = in_small_steps(model_dir, plan, residents, use)
    assert running == 0
    assert isinstance(after.end, Finished)


def test_an_asker_who_leaves_as_the_reading_is_handed_over_ends_nobody_elses_answer(
    model_dir: Path, plan: Plan, residents: list[Resident]
) -> None:
    async def use(engine: TransformersEngine) -> Any:
        class Leaving:
            def __init__(self, output: Output):
                self.request_id, self.generated, self.error = output.request_id, output.generated, output.error

            @property
            def finished(self) -> bool:
                asyncio.run(engine.abort("mine"))
                return True

        deliver = engine.steps.deliver

        def last_moment(outputs: Sequence[Output]) -> None:
            deliver([Leaving(one) if one.request_id == "mine" + READING else one for one in outputs])  # type: ignore[misc]

        engine.steps.deliver = last_moment  # type: ignore[method-assign]
        other = asyncio.create_task(ask(engine, "other", PROMPT, [residents[0].key], max_tokens=60))
        mine = asyncio.create_task(ask(engine, "mine", PROMPT, [one.key for one in residents]))
        ended = (await other).end
        mine.cancel()
        await asyncio.gather(mine, return_exceptions=True)
        return ended, engine.info()

    ended, info = in_small_steps(model_dir, plan, residents, use)
    assert isinstance(ended, Finished)
    assert (info.running, info.alive) == (0, True)


def test_a_silo_revoked_while_the_prompt_is_read_ends_the_request(
    model_dir: Path, plan: Plan, residents: list[Resident]
) -> None:
    async def use(engine: TransformersEngine) -> Any:
        return await while_reading(engine, request(residents), lambda: engine.revoke(residents[1].key))

    end = in_small_steps(model_dir, plan, residents, use)
    assert isinstance(end, Failed) and end.code == "adapter_replaced"


def test_a_permission_withdrawn_while_the_prompt_is_read_ends_the_request(
    model_dir: Path, plan: Plan, residents: list[Resident]
) -> None:
    guard = OpenGuard()

    async def use(engine: TransformersEngine) -> Any:
        async def withdraw() -> None:
            guard.lost["mine"] = Failed("permission_revoked", "gone")

        return await while_reading(engine, request(residents), withdraw)

    assert in_small_steps(model_dir, plan, residents, use, guard) == Failed("permission_revoked", "gone")


def test_a_silo_that_joins_while_the_prompt_is_read_does_not_disturb_it(
    model_dir: Path, plan: Plan, residents: list[Resident]
) -> None:
    newcomer = resident(plan, "aaa", 5)

    async def use(engine: TransformersEngine) -> Any:
        async def join() -> None:
            await engine.load(newcomer.key, newcomer.adapter, newcomer.statistics)

        return await while_reading(engine, request(residents), join)

    async def alone(engine: TransformersEngine) -> Any:
        return await ask(engine, "mine", PROMPT, [r.key for r in residents], max_tokens=8, attribution=True)

    assert in_small_steps(model_dir, plan, residents, use) == in_small_steps(model_dir, plan, residents, alone).end
