"""Swaps, revocations, cancellation and slots, with requests running."""

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from inference_gateway.engine.base import Failed, Finished, GenerationRequest, Tokens
from inference_gateway.engine.batching_edge import BatchingEdge
from inference_gateway.engine.transformers_engine import TransformersEngine
from inference_gateway.errors import EngineIncompatible
from seqr.models import load_base_model
from seqr.plan import Plan
from seqr.routed_linear import adapt_model, adapted
from seqr.shared_a import verify_a
from tests.inference_gateway.support import (
    OpenGuard,
    Reference,
    Resident,
    ask,
    build_engine,
    cached_numbers,
    prompts,
    resident,
    serve,
)

LONG = 60


async def first_tokens(
    engine: TransformersEngine, request_id: str, adapters: Any, count: int = 3
) -> tuple[Any, list[int]]:
    """Start a long request and wait for its first tokens."""
    request = GenerationRequest(request_id, tuple(prompts(1)[0]), LONG, frozenset(adapters), "prompt_evidence")
    events, tokens = engine.generate(request), []
    async for event in events:
        assert isinstance(event, Tokens)
        tokens.extend(event.ids)
        if len(tokens) >= count:
            break
    return events, tokens


async def rest_of(events: Any) -> tuple[list[int], Any]:
    tokens: list[int] = []
    async for event in events:
        if not isinstance(event, Tokens):
            return tokens, event
        tokens.extend(event.ids)
    raise AssertionError("the stream ended without an end")


@pytest.fixture
def alpha(plan: Plan) -> Resident:
    return resident(plan, "alpha", 1)


@pytest.fixture
def beta(plan: Plan) -> Resident:
    return resident(plan, "beta", 2)


def test_loading_an_adapter_leaves_running_requests_as_they_were(
    model_dir: Path, plan: Plan, alpha: Resident, beta: Resident
) -> None:
    async def use(engine: TransformersEngine) -> tuple[list[int], Any]:
        events, tokens = await first_tokens(engine, "running", [alpha.key])
        await engine.load(beta.key, beta.adapter, beta.statistics)
        rest, end = await rest_of(events)
        return tokens + rest, end

    tokens, end = serve(model_dir, plan, use, [alpha])
    assert isinstance(end, Finished)
    assert tokens == Reference(model_dir, plan, [alpha]).answer(prompts(1)[0], ["alpha"], "prompt_evidence", LONG)


def test_a_new_revision_ends_requests_of_the_old_one_and_serves_new_ones(
    model_dir: Path, plan: Plan, alpha: Resident, beta: Resident
) -> None:
    newer = resident(plan, "alpha", 9, revision=2)

    async def use(engine: TransformersEngine) -> Any:
        old, _ = await first_tokens(engine, "old", [alpha.key])
        other, head = await first_tokens(engine, "other", [beta.key])
        await engine.load(newer.key, newer.adapter, newer.statistics)
        _, end = await rest_of(old)
        rest, other_end = await rest_of(other)
        named_old = await ask(engine, "names the old one", prompts(1)[0], [alpha.key])
        fresh = await ask(engine, "fresh", prompts(1)[0], [newer.key])
        return end, head + rest, other_end, named_old, fresh

    end, other, other_end, named_old, fresh = serve(model_dir, plan, use, [alpha, beta])
    assert isinstance(end, Failed) and end.code == "adapter_replaced"
    assert isinstance(other_end, Finished)
    assert other == Reference(model_dir, plan, [beta]).answer(prompts(1)[0], ["beta"], "prompt_evidence", LONG)
    assert named_old.end == end and named_old.tokens == []
    assert fresh.tokens == Reference(model_dir, plan, [newer]).answer(prompts(1)[0], ["alpha"], "prompt_evidence")


def test_a_revoked_adapter_ends_its_requests_and_leaves_the_library_and_the_cache(
    model_dir: Path, plan: Plan, alpha: Resident
) -> None:
    async def use(engine: TransformersEngine) -> Any:
        events, _ = await first_tokens(engine, "running", [alpha.key])
        before = engine.info().library_version
        version = await engine.revoke(alpha.key)
        count = engine.info().generated_tokens
        _, end = await rest_of(events)
        return engine.info().generated_tokens - count, end, before, version, engine.info(), cached_numbers(engine)

    late, end, before, version, info, left = serve(model_dir, plan, use, [alpha])
    assert isinstance(end, Failed) and end.code == "adapter_replaced" and late == 0
    assert version == before + 1 == info.library_version and info.adapters == ()
    assert left == 0


def test_a_retiring_adapter_takes_no_new_request_and_leaves_after_the_last(
    model_dir: Path, plan: Plan, alpha: Resident
) -> None:
    async def use(engine: TransformersEngine) -> Any:
        events, _ = await first_tokens(engine, "running", [alpha.key])
        retiring = asyncio.create_task(engine.retire(alpha.key))
        await asyncio.sleep(0)
        late = await ask(engine, "late", prompts(1)[0], [alpha.key])
        _, end = await rest_of(events)
        await retiring
        return late.end, end, engine.info().adapters

    late, end, adapters = serve(model_dir, plan, use, [alpha])
    assert isinstance(late, Failed) and isinstance(end, Finished) and adapters == ()


def test_a_request_comes_in_while_a_revoked_adapter_is_wiped_from_the_cache(
    model_dir: Path, plan: Plan, alpha: Resident, monkeypatch: pytest.MonkeyPatch
) -> None:
    wiping, came_in = threading.Event(), threading.Event()

    async def use(engine: TransformersEngine) -> Any:
        wipe = BatchingEdge.wipe_cache

        def slow(edge: BatchingEdge, keep: list[str]) -> None:
            wiping.set()
            came_in.wait(10)
            wipe(edge, keep)

        monkeypatch.setattr(BatchingEdge, "wipe_cache", slow)
        revoking = asyncio.create_task(engine.revoke(alpha.key))
        await asyncio.to_thread(wiping.wait, 10)
        asking = asyncio.create_task(ask(engine, "meanwhile", prompts(1)[0], []))
        while not engine.info().running and not revoking.done():
            await asyncio.sleep(0.001)
        meanwhile = not revoking.done() and engine.info().running == 1
        came_in.set()
        await revoking
        return meanwhile, await asking

    meanwhile, answer = serve(model_dir, plan, use, [alpha])
    assert meanwhile
    assert answer.tokens == Reference(model_dir, plan, [alpha]).answer(prompts(1)[0], [], "prompt_evidence")


def test_no_token_follows_a_withdrawal(model_dir: Path, plan: Plan, alpha: Resident) -> None:
    guard = OpenGuard()
    gone = Failed("permission_revoked", "gone")

    async def use(engine: TransformersEngine) -> Any:
        events, _ = await first_tokens(engine, "running", [alpha.key])
        # Tokens that were handed out before are drained; the withdrawal is complete when the guard has been asked.
        guard.lost = {"running": gone}
        asked = guard.asked
        while guard.asked < asked + 2 and engine.info().running:
            await asyncio.sleep(0.001)
        count = engine.info().generated_tokens
        _, end = await rest_of(events)
        await asyncio.sleep(0.05)
        return end, engine.info().generated_tokens - count, engine.info().running

    end, more, still = serve(model_dir, plan, use, [alpha], guard=guard)
    assert end == gone and more == 0 and still == 0


def test_a_request_that_ends_before_it_is_submitted_leaves_no_pass_behind(
    model_dir: Path, plan: Plan, alpha: Resident, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = OpenGuard()
    gone = Failed("permission_revoked", "gone")

    async def use(engine: TransformersEngine) -> Any:
        other = asyncio.create_task(ask(engine, "other", prompts(1)[0], [alpha.key], max_tokens=3000))
        while not engine.info().steps:
            await asyncio.sleep(0.001)
        submit, begin, steps = BatchingEdge.submit, engine.steps.begin, []

        def spy(batch: Any) -> Any:
            steps.extend(1 for one in batch.slices if one.request_id == "mine")
            return begin(batch)

        engine.steps.begin = spy  # type: ignore[method-assign]

        def late(edge: BatchingEdge, request_id: str, *args: Any) -> None:
            assert engine.info().running == 2
            guard.lost = {"mine": gone}
            while engine.info().running == 2:
                time.sleep(0.001)
            ended = engine.info().steps
            while engine.info().steps < ended + 2:  # until what was said to the worker about the request is forgotten
                time.sleep(0.001)
            submit(edge, request_id, *args)

        monkeypatch.setattr(BatchingEdge, "submit", late)
        mine = await ask(engine, "mine", prompts(1)[0], [alpha.key], max_tokens=3000)
        monkeypatch.undo()
        await ask(engine, "tick", [5], [])
        other.cancel()
        await asyncio.gather(other, return_exceptions=True)
        return mine, len(steps)

    mine, steps = serve(model_dir, plan, use, [alpha], guard=guard)
    assert (mine.tokens, mine.end) == ([], gone)
    assert steps <= 1  # one may have begun meanwhile


def test_a_guard_that_fails_ends_only_requests_that_use_a_silo(model_dir: Path, plan: Plan, alpha: Resident) -> None:
    class Broken(OpenGuard):
        def withdrawn(self) -> Any:
            raise RuntimeError("no policy")

    async def use(engine: TransformersEngine) -> Any:
        return await asyncio.gather(
            ask(engine, "silo", prompts(1)[0], [alpha.key]), ask(engine, "base", prompts(1)[0], [])
        )

    silo, base = serve(model_dir, plan, use, [alpha], guard=Broken())
    assert silo.tokens == [] and isinstance(silo.end, Failed)
    assert isinstance(base.end, Finished)


def test_a_closed_stream_gives_back_its_slot_and_its_cache(model_dir: Path, plan: Plan, alpha: Resident) -> None:
    async def use(engine: TransformersEngine) -> Any:
        for i in range(20):  # more than there are slots
            events, _ = await first_tokens(engine, f"r{i}", [alpha.key], count=1)
            await events.aclose()
        whole = await ask(engine, "whole", prompts(1)[0], [alpha.key])
        await ask(engine, "tick", [5], [])
        return whole, engine.info().running, engine.info().kv_blocks_used

    whole, still, blocks = serve(model_dir, plan, use, [alpha], max_concurrent=2)
    assert whole.tokens == Reference(model_dir, plan, [alpha]).answer(prompts(1)[0], ["alpha"], "prompt_evidence")
    assert still == 0 and blocks <= 1  # the last request's, until the next step


def test_more_requests_than_places_wait_their_turn(model_dir: Path, plan: Plan, alpha: Resident) -> None:
    async def use(engine: TransformersEngine) -> Any:
        return await asyncio.gather(*(ask(engine, f"r{i}", prompts(1)[0], [alpha.key]) for i in range(9)))

    answers = serve(model_dir, plan, use, [alpha], max_concurrent=2)
    assert all(isinstance(answer.end, Finished) for answer in answers)
    assert len({tuple(answer.tokens) for answer in answers}) == 1


def test_a_full_cache_starts_requests_again_without_changing_their_answers(
    model_dir: Path, plan: Plan, alpha: Resident
) -> None:
    texts = [text[:30] for text in prompts(6, seed=5, longest=60)]

    async def use(engine: TransformersEngine) -> Any:
        jobs = (ask(engine, f"r{i}", text, [alpha.key], max_tokens=40) for i, text in enumerate(texts))
        return await asyncio.gather(*jobs)

    answers = serve(model_dir, plan, use, [alpha], kv_tokens=192, max_concurrent=6)
    reference = Reference(model_dir, plan, [alpha])
    assert [answer.tokens for answer in answers] == [
        reference.answer(t, ["alpha"], "prompt_evidence", 40) for t in texts
    ]


def test_a_second_users_prefill_shares_no_block_with_the_firsts(
    model_dir: Path, plan: Plan, alpha: Resident, beta: Resident
) -> None:
    """The same 200 tokens, first for one permitted set, then for another: as if the first had never been asked."""
    text = [7 + i % 250 for i in range(200)]

    async def use(engine: TransformersEngine) -> Any:
        prefilled: dict[str, int] = {}
        begin = engine.steps.begin

        def spy(batch: Any) -> Any:
            for one in batch.slices:
                if one.position < len(text):
                    prefilled[one.request_id] = prefilled.get(one.request_id, 0) + one.length
            return begin(batch)

        engine.steps.begin = spy  # type: ignore[method-assign]
        first, _ = await first_tokens(engine, "long", [alpha.key])
        await ask(engine, "alice", text, [alpha.key], max_tokens=4)
        bob = await ask(engine, "bob", text, [beta.key], max_tokens=4)
        await first.aclose()
        return prefilled, bob.tokens, engine.info().prefix_queries

    prefilled, tokens, looked_up = serve(model_dir, plan, use, [alpha, beta])
    assert prefilled["alice"] == prefilled["bob"] == len(text) and looked_up == 0

    async def cold(engine: TransformersEngine) -> Any:
        return (await ask(engine, "bob", text, [beta.key], max_tokens=4)).tokens

    assert tokens == serve(model_dir, plan, cold, [beta])


def test_one_users_overflow_ends_that_request_and_reaches_nobody_else(
    model_dir: Path, plan: Plan, alpha: Resident
) -> None:
    huge = resident(plan, "huge", 5, strength=1e30)
    wild = Resident(huge.key, huge.adapter, dict.fromkeys(huge.statistics, (1.0, 1e30)))

    async def use(engine: TransformersEngine) -> Any:
        return await asyncio.gather(
            *(
                ask(engine, f"{silo.key.silo_id}{i}", prompts(1)[0], [silo.key])
                for i in range(3)
                for silo in (alpha, wild)
            )
        )

    answers = serve(model_dir, plan, use, [alpha, wild])
    expected = Reference(model_dir, plan, [alpha]).answer(prompts(1)[0], ["alpha"], "prompt_evidence")
    assert [answer.tokens for answer in answers[::2]] == [expected] * 3
    assert all(isinstance(answer.end, Failed) for answer in answers[1::2])


def test_requests_are_let_in_after_everybody_left_whom_a_preemption_spared(
    model_dir: Path, plan: Plan, alpha: Resident
) -> None:
    """As when their client closes the connection, a stop string comes or a deadline passes."""

    async def use(engine: TransformersEngine) -> Any:
        prompt = tuple(range(3, 43))

        async def listen(name: str) -> None:
            async for event in engine.generate(
                GenerationRequest(name, prompt, 80, frozenset([alpha.key]), "per_token")
            ):
                assert isinstance(event, Tokens)

        # Both are let in, and together they outgrow the cache.
        both, most = [asyncio.create_task(listen(name)) for name in ("one", "two")], 0
        while (used := engine.info().kv_blocks_used) >= most and not any(task.done() for task in both):
            most = used
            await asyncio.sleep(0.001)
        for task in both:
            task.cancel()
        await asyncio.gather(*both, return_exceptions=True)
        return used, most, await asyncio.wait_for(ask(engine, "next", prompt, [alpha.key], max_tokens=3), 60)

    used, most, answer = serve(
        model_dir, plan, use, [alpha], kv_tokens=160, max_batch_tokens=64, page_size=16, prefix_sharing=False
    )
    assert 0 < used < most, "nobody was preempted"
    assert isinstance(answer.end, Finished) and len(answer.tokens) == 3


def test_a_pass_whose_cancellation_came_too_early_is_dropped(model_dir: Path, plan: Plan, alpha: Resident) -> None:
    async def use(engine: TransformersEngine) -> Any:
        engine._edge.submit("nobody's", prompts(1)[0], 4000, [])
        answer = await ask(engine, "next", prompts(1)[0], [alpha.key], max_tokens=3)
        for _ in range(3000):
            if engine.info().kv_blocks_used == 0:
                break
            await asyncio.sleep(0.01)
        return answer, engine.info().kv_blocks_used, engine.info().steps

    answer, used, steps = serve(model_dir, plan, use, [alpha])
    assert isinstance(answer.end, Finished) and used == 0 and steps < 100


def test_an_engine_routes_the_modules_that_read_the_same_together(model_dir: Path, plan: Plan) -> None:
    model, _ = load_base_model(model_dir, torch.float32, "sdpa")
    adapt_model(model, plan, verify_a(plan))
    TransformersEngine(model, plan, OpenGuard(), [2])
    sites = {spec.name.rpartition(".")[2]: adapted(model, spec.name).site for spec in plan.modules}
    assert sites["q_proj"] is sites["k_proj"] is sites["v_proj"] is not sites["o_proj"]
    assert sites["gate_proj"] is sites["up_proj"] is not sites["down_proj"]


def test_a_processor_whose_products_depend_on_their_company_is_refused(
    model_dir: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.bmm

    def bmm_that_minds(left: torch.Tensor, right: torch.Tensor, **out: torch.Tensor) -> torch.Tensor:
        return real(left, right, **out) * (1 + 2**-22 if left.shape[0] < 8 else 1)

    monkeypatch.setattr(torch, "bmm", bmm_that_minds)
    with pytest.raises(EngineIncompatible, match=r"with \d+ threads, a product of 16 rows by \d+ x \d+ has other bits"):
        build_engine(model_dir, plan)
