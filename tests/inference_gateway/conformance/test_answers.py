"""The greedy tokens of the slow reference, for 24 users at once, through swaps and revocations."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest

from inference_gateway.engine.base import AdapterKey, Engine, Failed, Finished, GenerationRequest, Tokens, TokenShares
from seqr.plan import Plan
from tests.inference_gateway.support import Reference, Resident, prompts, with_engine

NEAR_TIE = 2e-5
MODES = ("prompt_evidence", "evidence", "per_token")
SETS = (("alpha",), ("beta",), ("alpha", "gamma"), ("alpha", "beta", "gamma"), ())
LENGTH = 16
MakeEngine = Callable[..., Engine]


@dataclass
class User:
    """One user's request and what has come of it."""

    prompt: list[int]
    silos: tuple[str, ...]
    mode: str
    expected: list[int]
    tokens: list[int] = field(default_factory=list)
    end: Finished | Failed | None = None
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    async def ask(self, engine: Engine, name: str, keys: Sequence[AdapterKey]) -> None:
        request = GenerationRequest(name, tuple(self.prompt), LENGTH, frozenset(keys), self.mode)
        async for event in engine.generate(request):
            if isinstance(event, Tokens):
                self.tokens.extend(event.ids)
                self.begun.set()
            else:
                self.end = event
                self.begun.set()


def users(reference: Reference, count: int, seed: int, sets: tuple[tuple[str, ...], ...] = SETS) -> list[User]:
    """Users with prompts of mixed length, none of whose choices is so near a tie that fp32 may rightly differ."""
    return [User(list(prompt), *rest) for prompt, *rest in _expected(reference, count, seed, sets)]


@cache
def _expected(reference: Reference, count: int, seed: int, sets: tuple[tuple[str, ...], ...]) -> list[Any]:
    found: list[Any] = []
    for text in prompts(4 * count, seed=seed, longest=64):
        silos, mode = sets[len(found) % len(sets)], MODES[len(found) % len(MODES)]
        expected = reference.answer(text, silos, mode, LENGTH)
        if reference.margin > NEAR_TIE:
            found.append((text, silos, mode, expected))
        if len(found) == count:
            return found
    raise AssertionError(f"only {len(found)} of {count} prompts have choices that are no ties")


@pytest.fixture(scope="module")
def first(residents: dict[str, Resident]) -> list[Resident]:
    return [residents[silo] for silo in ("alpha", "beta", "gamma")]


def test_24_mixed_users_get_the_tokens_of_the_slow_reference(
    make_engine: MakeEngine, residents: dict[str, Resident], first: list[Resident], reference: Reference
) -> None:
    everybody = users(reference, 24, seed=0)

    async def use(engine: Engine) -> None:
        jobs = (u.ask(engine, f"r{i}", [residents[s].key for s in u.silos]) for i, u in enumerate(everybody))
        await asyncio.gather(*jobs)

    with_engine(make_engine(), first, use)
    assert all(isinstance(user.end, Finished) for user in everybody)
    assert [user.tokens for user in everybody] == [user.expected for user in everybody]
    assert len({(user.silos, user.mode) for user in everybody}) == len(SETS) * len(MODES)
    # The test can tell sets apart. (Two sets may well agree on the one silo that a whole prompt speaks for.)
    others = [reference.answer(u.prompt, SETS[(i + 1) % 4], u.mode, LENGTH) for i, u in enumerate(everybody[:5])]
    assert sum(user.expected != other for user, other in zip(everybody, others, strict=False)) >= 3


def test_attribution_tells_in_how_many_modules_the_slow_reference_chose_each_silo(
    make_engine: MakeEngine, plan: Plan, residents: dict[str, Resident], first: list[Resident], reference: Reference
) -> None:
    asking = users(reference, 9, seed=5, sets=(("alpha", "beta", "gamma"), ("alpha", "gamma"), ("beta",)))
    told: list[list[TokenShares]] = [[] for _ in asking]

    async def ask(engine: Engine, index: int, user: User) -> None:
        keys = frozenset(residents[silo].key for silo in user.silos)
        request = GenerationRequest(f"r{index}", tuple(user.prompt), LENGTH, keys, user.mode, attribution=True)
        async for event in engine.generate(request):
            if isinstance(event, Tokens):
                told[index].extend(event.shares)

    async def use(engine: Engine) -> None:
        await asyncio.gather(*(ask(engine, i, user) for i, user in enumerate(asking)))

    with_engine(make_engine(), first, use)
    for user, shares in zip(asking, told, strict=True):
        reference.answer(user.prompt, user.silos, user.mode, LENGTH)
        assert [dict(one.counts) for one in shares] == reference.won
        assert {one.choices for one in shares} == {len(plan.modules)}
    assert any(len(one.counts) > 1 for shares in told for one in shares)


def test_swaps_and_revocations_in_the_middle_touch_nobody_else(
    make_engine: MakeEngine,
    residents: dict[str, Resident],
    first: list[Resident],
    reference: Reference,
    later_reference: Reference,
) -> None:
    """A silo joins, one gets another revision and one is revoked while all 24 are being answered."""
    everybody = users(reference, 24, seed=1)
    newcomers = users(later_reference, 6, seed=2, sets=(("alpha", "beta", "delta"), ("beta",)))
    names = {"alpha": "alpha", "beta": "beta-2", "delta": "delta"}

    async def use(engine: Engine) -> None:
        jobs = [
            asyncio.create_task(user.ask(engine, f"r{i}", [residents[s].key for s in user.silos]))
            for i, user in enumerate(everybody)
        ]
        await asyncio.gather(*(user.begun.wait() for user in everybody[:6]))
        for name in ("delta", "beta-2"):
            await engine.load(residents[name].key, residents[name].adapter, residents[name].statistics)
        await engine.revoke(residents["gamma"].key)
        late = (
            user.ask(engine, f"n{i}", [residents[names[silo]].key for silo in user.silos])
            for i, user in enumerate(newcomers)
        )
        await asyncio.gather(*jobs, *late)

    with_engine(make_engine(), first, use)
    touched = [user for user in everybody if {"beta", "gamma"} & set(user.silos)]
    for user in everybody:
        if user in touched and isinstance(user.end, Failed):
            assert user.end.code == "adapter_replaced"
            assert user.tokens == user.expected[: len(user.tokens)]
        else:
            assert isinstance(user.end, Finished) and user.tokens == user.expected
    cut = [bool(user.tokens) for user in touched if isinstance(user.end, Failed)]
    assert len(cut) > 3 and any(cut), cut  # cut short, some of them while they were writing
    assert [user.tokens for user in newcomers] == [user.expected for user in newcomers]


def test_a_withdrawn_request_ends_with_the_guards_reason_and_the_others_go_on(
    make_engine: MakeEngine, residents: dict[str, Resident], first: list[Resident], reference: Reference
) -> None:
    everybody = users(reference, 9, seed=3)
    # Those with most to say, so that there is something left to withdraw.
    longest = sorted(range(9), key=lambda i: -len(everybody[i].expected))[:3]
    lost = {f"r{i}": Failed("permission_revoked", f"for r{i}") for i in longest}

    class Guard:
        withdraws = False

        def withdrawn(self) -> dict[str, Failed]:
            return lost if self.withdraws else {}

    guard = Guard()

    async def use(engine: Engine) -> None:
        jobs = [
            asyncio.create_task(user.ask(engine, f"r{i}", [residents[s].key for s in user.silos]))
            for i, user in enumerate(everybody)
        ]
        await asyncio.gather(*(user.begun.wait() for user in everybody))
        guard.withdraws = True
        await asyncio.gather(*jobs)

    with_engine(make_engine(guard), first, use)
    for i, user in enumerate(everybody):
        if f"r{i}" in lost:
            assert user.end == lost[f"r{i}"] and user.tokens == user.expected[: len(user.tokens)]
        else:
            assert isinstance(user.end, Finished) and user.tokens == user.expected


def test_an_answer_ends_at_its_limit_or_at_the_end_of_sequence_token(
    make_engine: MakeEngine, first: list[Resident], reference: Reference
) -> None:
    everybody = users(reference, 12, seed=4, sets=((),))

    async def use(engine: Engine) -> None:
        await asyncio.gather(*(user.ask(engine, f"r{i}", []) for i, user in enumerate(everybody)))

    with_engine(make_engine(), first, use)
    for user in everybody:
        assert isinstance(user.end, Finished)
        assert user.end.reason == ("length" if len(user.tokens) == LENGTH and user.tokens[-1] != 2 else "stop")


def test_an_adapter_that_is_not_there_is_not_replaced_by_anything(
    make_engine: MakeEngine, residents: dict[str, Resident], first: list[Resident]
) -> None:
    user = User([5, 6, 7], (), "prompt_evidence", [])

    async def use(engine: Engine) -> None:
        await user.ask(engine, "r", [residents["alpha"].key, residents["delta"].key])

    with_engine(make_engine(), first, use)
    assert isinstance(user.end, Failed) and user.end.code == "adapter_replaced" and user.tokens == []


def test_a_retiring_adapter_serves_out_its_requests_and_no_new_one(
    make_engine: MakeEngine, residents: dict[str, Resident], first: list[Resident], reference: Reference
) -> None:
    early, late = users(reference, 2, seed=5, sets=(("alpha",),))

    async def use(engine: Engine) -> Any:
        key = residents["alpha"].key
        job = asyncio.create_task(early.ask(engine, "early", [key]))
        await early.begun.wait()
        retiring = asyncio.create_task(engine.retire(key))
        await asyncio.sleep(0)
        await late.ask(engine, "late", [key])
        await asyncio.gather(job, retiring)
        return engine.info().adapters

    left = with_engine(make_engine(), first, use)
    assert early.tokens == early.expected and isinstance(early.end, Finished)
    assert isinstance(late.end, Failed) and residents["alpha"].key not in left


def test_who_leaves_makes_room_and_what_is_left_is_told(
    make_engine: MakeEngine, residents: dict[str, Resident], first: list[Resident]
) -> None:
    async def use(engine: Engine) -> Any:
        key = frozenset([residents["alpha"].key])
        for i in range(30):  # more than there are places
            stream: AsyncGenerator[Any] = engine.generate(GenerationRequest(f"r{i}", (5, 6, 7), 40, key, "evidence"))
            await anext(stream)
            await stream.aclose()
        await engine.abort("r0")  # unknown by now, and ignored
        done = User([5, 6, 7], ("alpha",), "evidence", [])
        await done.ask(engine, "last", list(key))
        return done, engine.info()

    done, info = with_engine(make_engine(), first, use)
    assert isinstance(done.end, Finished)
    assert (info.running, info.waiting, info.alive) == (0, 0, True)
    assert set(info.adapters) == {one.key for one in first}
    assert info.steps > 0 and info.step_seconds > 0 and info.kv_blocks > 0
