"""Isolation in the engine: what a user may not use changes no bit of that user's tokens, logits, logprobs or shares.

All requests of a scenario are in the queue before the first step, so that the batches have one fixed composition.
"""

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from inference_gateway.engine.base import (
    AdapterKey,
    GenerationRequest,
    Sampling,
    TokenLogprobs,
    Tokens,
    TokenShares,
)
from inference_gateway.engine.transformers_engine import TransformersEngine
from seqr.plan import Plan
from tests.inference_gateway.support import Resident, prompts, random_adapter, resident, serve

MODES = ("prompt_evidence", "evidence", "per_token")
MINE = prompts(1, seed=8)[0] + prompts(1, seed=9)[0]
LENGTH = 16
Told = list[tuple[TokenLogprobs, TokenShares]]
Seen = tuple[list[int], list[torch.Tensor], Told]


@pytest.fixture(scope="module")
def permitted(plan: Plan) -> list[Resident]:
    return [resident(plan, "m-one", 1), resident(plan, "t-two", 2)]


@pytest.fixture(scope="module")
def forbidden(plan: Plan) -> list[Resident]:
    """Silos whose columns lie before, between and after the permitted ones."""
    return [resident(plan, name, 20 + i) for i, name in enumerate(("a-first", "n-middle", "z-last"))]


class Observer:
    """Submits requests that all start in one step, and notes the logits of the one called ``mine``."""

    def __init__(self, engine: TransformersEngine):
        self.engine = engine
        self.logits: list[torch.Tensor] = []
        self.told: Told = []
        self._pick = engine.steps.pick
        engine.steps.pick = self._spy  # type: ignore[method-assign]

    def _spy(self, request_ids: Sequence[str], logits: torch.Tensor) -> None:
        self.logits += [logits[row].clone() for row, name in enumerate(request_ids) if name == "mine"]
        for row, name in enumerate(request_ids):
            if name != "mine":  # a token that ends nothing, so that the others stay in the batch to their limit
                logits[row].fill_(0.0)
                logits[row, 5] = 1.0
        self._pick(request_ids, logits)

    async def _ask(self, request: GenerationRequest) -> list[int]:
        tokens: list[int] = []
        async for event in self.engine.generate(request):
            if isinstance(event, Tokens):
                tokens.extend(event.ids)
                if request.request_id == "mine":
                    self.told.extend(zip(event.logprobs, event.shares, strict=True))
        return tokens

    async def together(self, requests: Sequence[GenerationRequest], during: Any = None) -> Seen:
        """The tokens and logits of ``mine``; ``during`` runs while it is answered."""
        gate = threading.Event()
        begin = self.engine.steps.begin

        def hold(batch: Any) -> Any:
            gate.wait(30)
            return begin(batch)

        self.engine.steps.begin = hold  # type: ignore[method-assign]
        # The first request holds the worker in its first step until all the others are queued behind it.
        first = asyncio.create_task(self._ask(GenerationRequest("first", (3,), 1, frozenset(), "per_token")))
        await asyncio.sleep(0.05)
        jobs = [asyncio.create_task(self._ask(request)) for request in requests]
        await asyncio.sleep(0.05)
        gate.set()
        mine = jobs[[request.request_id for request in requests].index("mine")]
        while during is not None and not mine.done():
            await during()
        await asyncio.gather(first, *jobs)
        return await mine, self.logits, self.told


def request(name: str, prompt: Sequence[int], keys: Sequence[AdapterKey], mode: str) -> GenerationRequest:
    mine = name == "mine"
    sampling = Sampling(logprobs=5) if mine else Sampling()
    return GenerationRequest(name, tuple(prompt), LENGTH, frozenset(keys), mode, sampling=sampling, attribution=mine)


def same(one: Seen, other: Seen) -> bool:
    """The same tokens from the same bits, told in the same numbers."""
    assert len(one[0]) == len(one[1]) == len(one[2]) > 0
    told = one[0] == other[0] and one[2] == other[2]
    return told and all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


def observe(
    model_dir: Path,
    plan: Plan,
    permitted: list[Resident],
    others: list[Resident],
    mode: str,
    crowd: Sequence[tuple[list[int], list[AdapterKey]]] = (),
    swapped: Sequence[str] = (),
    **limits: Any,
) -> Seen:
    """One user's answer under ``permitted`` beside resident ``others``, a crowd of requests and swaps."""

    async def use(engine: TransformersEngine) -> Seen:
        keys = [one.key for one in permitted]
        asked = [request("mine", MINE, keys, mode)]
        asked += [request(f"o{i}", text, some, "per_token") for i, (text, some) in enumerate(crowd)]
        revision = 2

        async def swap() -> None:
            nonlocal revision
            for silo in swapped:
                one = resident(plan, silo, revision, revision)
                await engine.load(one.key, one.adapter, one.statistics)
            revision += 1

        return await Observer(engine).together(asked, swap if swapped else None)

    chosen = {"max_batch_tokens": 64, "max_concurrent": 16} | limits
    return serve(model_dir, plan, use, [*permitted, *others], **chosen)  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", MODES)
def test_a_thousand_forbidden_silos_change_no_bit(
    model_dir: Path, plan: Plan, permitted: list[Resident], forbidden: list[Resident], mode: str
) -> None:
    alone = observe(model_dir, plan, permitted, [], mode)
    assert same(alone, observe(model_dir, plan, permitted, forbidden, mode))
    few = [random_adapter(plan, 100 + i) for i in range(4)]
    crowd = [AdapterKey(f"{'amtz'[i % 4]}-{i:04d}", 1, few[i % 4].digest) for i in range(1000)]

    async def use(engine: TransformersEngine) -> Seen:
        # One at a time would stack the library a thousand times over.
        library = engine._residents.library
        made = [library._column("", 1, few[i % 4], forbidden[i % 3].statistics) for i in range(12)]
        columns = [*library._columns]
        columns += [replace(made[i % 12], silo_id=key.silo_id) for i, key in enumerate(crowd)]
        whole = type(library)(plan, columns, library.version + 1)
        engine._change(lambda _: whole, lambda keys: keys | set(crowd))
        assert len(engine.info().adapters) == 1002
        keys = [one.key for one in permitted]
        return await Observer(engine).together([request("mine", MINE, keys, mode)])

    thousand = serve(model_dir, plan, use, permitted, max_batch_tokens=64, max_concurrent=16)
    assert same(alone, thousand)


@pytest.mark.parametrize("mode", MODES)
def test_forbidden_silos_whose_weights_are_no_numbers_change_no_bit(
    model_dir: Path, plan: Plan, permitted: list[Resident], forbidden: list[Resident], mode: str
) -> None:
    poisoned = []
    for i, one in enumerate(forbidden):
        adapter = random_adapter(plan, 20 + i)
        for module in adapter.modules.values():
            module.q.fill_(float("nan"))
            module.r[0, 0] = float("inf")
        poisoned.append(Resident(one.key, adapter, dict.fromkeys(one.statistics, (float("nan"), 0.0))))
    alone = observe(model_dir, plan, permitted, [], mode)
    assert same(alone, observe(model_dir, plan, permitted, poisoned, mode))


@pytest.mark.parametrize("mode", MODES)
def test_swapping_forbidden_silos_changes_no_bit(
    model_dir: Path, plan: Plan, permitted: list[Resident], forbidden: list[Resident], mode: str
) -> None:
    alone = observe(model_dir, plan, permitted, [], mode)
    swapping = observe(model_dir, plan, permitted, forbidden, mode, swapped=("a-first", "n-middle", "z-last"))
    assert same(alone, swapping)


@pytest.mark.parametrize("mode", MODES)
def test_others_who_use_forbidden_silos_beside_it_change_no_bit(
    model_dir: Path, plan: Plan, permitted: list[Resident], forbidden: list[Resident], mode: str
) -> None:
    """The same prompts in the same batches: asked of nobody, of forbidden silos, and of silos that overflow."""
    texts = prompts(6, seed=11, longest=40)
    huge = replace(resident(plan, "z-last", 5, strength=1e30), statistics=forbidden[2].statistics)
    mute = [(text, list[AdapterKey]()) for text in texts]
    loud = [(text, [forbidden[i % 3].key]) for i, text in enumerate(texts)]
    burst = [(text, [huge.key]) for text in texts]
    first = observe(model_dir, plan, permitted, forbidden, mode, mute)
    assert same(first, observe(model_dir, plan, permitted, forbidden, mode, loud))
    assert same(first, observe(model_dir, plan, permitted, [*forbidden[:2], huge], mode, burst))


@pytest.mark.parametrize("mode", MODES)
def test_a_deterministic_engine_gives_the_same_bits_with_other_prompts_beside_it(
    model_dir: Path, plan: Plan, permitted: list[Resident], forbidden: list[Resident], mode: str
) -> None:
    alone = observe(model_dir, plan, permitted, [], mode, deterministic=True)
    for seed, longest in ((12, 20), (13, 90)):
        crowd = [(text, [forbidden[i % 3].key]) for i, text in enumerate(prompts(5, seed=seed, longest=longest))]
        assert same(alone, observe(model_dir, plan, permitted, forbidden, mode, crowd, deterministic=True))
