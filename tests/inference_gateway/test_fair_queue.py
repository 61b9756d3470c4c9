"""The queue in front of the engine: bounded, fair, and losing no place whatever is cancelled when."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_gateway.errors import Overloaded, QueueTimeout
from inference_gateway.fair_queue import FairQueue

FOREVER = 3600.0


def run(test: Callable[[], Awaitable[Any]]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(test(), 60)

    return asyncio.run(bounded())


class Users:
    """Requests that note in ``order`` when they get their place and give it back when told to."""

    def __init__(self, queue: FairQueue):
        self.queue = queue
        self.order: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def ask(self, user: str, tokens: int = 10, times: int = 1) -> None:
        async def request() -> None:
            await self.queue.enter(user, tokens, FOREVER)
            self.order.append(user)
            await asyncio.sleep(0)
            self.queue.leave(user)

        self.tasks += [asyncio.create_task(request()) for _ in range(times)]
        await asyncio.sleep(0)

    async def finish(self) -> list[BaseException | None]:
        return await asyncio.gather(*self.tasks, return_exceptions=True)


@pytest.mark.parametrize("places", [1, 2, 16])
def test_a_user_with_100_requests_does_not_starve_one_with_1(places: int) -> None:
    async def session() -> list[str]:
        queue = FairQueue(places, 200)
        users = Users(queue)
        for _ in range(places):
            await queue.enter("holder", 0, FOREVER)
        await users.ask("many", times=100)
        await users.ask("one")
        for _ in range(places):
            queue.leave("holder")
        await users.finish()
        return users.order

    assert run(session).index("one") == 1


def test_a_user_at_the_cap_leaves_a_place_to_whoever_comes() -> None:
    async def session() -> None:
        queue = FairQueue(4, 16, per_user=3)
        users = [asyncio.create_task(queue.enter("many", 10, FOREVER)) for _ in range(6)]
        await asyncio.sleep(0)
        assert (queue.running, queue.waiting) == (3, 3)
        await queue.enter("one", 10_000, 0.01)
        assert (queue.running, queue.waiting) == (4, 3)
        queue.leave("one")
        await asyncio.sleep(0)
        assert (queue.running, queue.waiting) == (3, 3)
        for _ in range(6):
            queue.leave("many")
            await asyncio.sleep(0)
        await asyncio.gather(*users)
        assert (queue.running, queue.waiting) == (0, 0)

    run(session)


def test_users_with_equal_requests_take_turns() -> None:
    async def session() -> list[str]:
        queue = FairQueue(1, 100)
        users = Users(queue)
        await queue.enter("holder", 0, FOREVER)
        for user in ("a", "b", "c"):
            await users.ask(user, times=3)
        queue.leave("holder")
        await users.finish()
        return users.order

    assert run(session) == ["a", "b", "c"] * 3


def test_tokens_are_what_is_shared_and_those_of_answers_count() -> None:
    async def session() -> list[str]:
        queue = FairQueue(1, 100)
        users = Users(queue)
        await queue.enter("holder", 0, FOREVER)
        await users.ask("long", tokens=100, times=3)
        await users.ask("short", tokens=10, times=12)
        queue.leave("holder")
        while users.order.count("short") < 2:
            await asyncio.sleep(0)
        queue.count("short", 200)  # a long answer to a short prompt
        await users.finish()
        return users.order

    assert run(session)[:6] == ["long", "short", "short", "long", "long", "short"]


def test_time_away_earns_no_credit() -> None:
    async def session() -> list[str]:
        queue = FairQueue(1, 100)
        users = Users(queue)
        await users.ask("busy", tokens=1000, times=5)
        await users.finish()
        users.order.clear()
        await queue.enter("holder", 0, FOREVER)
        await users.ask("busy", tokens=10, times=3)
        await users.ask("idle", tokens=10, times=3)
        queue.leave("holder")
        await users.finish()
        return users.order

    assert run(session).index("busy") <= 2


def test_the_queue_is_bounded() -> None:
    async def session() -> None:
        queue = FairQueue(1, 2)
        users = Users(queue)
        await queue.enter("holder", 0, FOREVER)
        await users.ask("a", times=2)
        with pytest.raises(Overloaded, match="too many requests are waiting") as refused:
            await queue.enter("a", 1, FOREVER)
        assert (refused.value.status, refused.value.retry_after) == (503, 1)
        assert queue.waiting == 2
        queue.leave("holder")
        await users.finish()
        assert (queue.running, queue.waiting) == (0, 0)

    run(session)


def test_with_no_waiting_allowed_free_places_are_still_given() -> None:
    async def session() -> None:
        queue = FairQueue(1, 0)
        await queue.enter("a", 1, FOREVER)
        with pytest.raises(Overloaded):
            await queue.enter("b", 1, FOREVER)

    run(session)


def test_nobody_can_fill_the_queue_for_the_others() -> None:
    async def session() -> tuple[list[str], list[BaseException | None]]:
        queue = FairQueue(1, 4)
        users = Users(queue)
        await queue.enter("holder", 0, FOREVER)
        await users.ask("flood", times=4)
        await users.ask("one")
        queue.leave("holder")
        return users.order, await users.finish()

    order, ends = run(session)
    assert sorted(order) == ["flood"] * 3 + ["one"]
    assert [type(end) for end in ends] == [type(None)] * 3 + [Overloaded, type(None)]  # its last request made room


def test_who_waits_too_long_is_told_so() -> None:
    async def session() -> None:
        queue = FairQueue(1, 4)
        await queue.enter("holder", 0, FOREVER)
        with pytest.raises(QueueTimeout, match=r"no place became free within 0\.01 s") as refused:
            await queue.enter("a", 1, 0.01)
        assert (refused.value.status, refused.value.code) == (503, "queue_timeout")
        assert queue.waiting == 0

    run(session)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 6)), max_size=25), st.integers(0, 999))
def test_no_place_is_lost_or_given_twice_whatever_is_cancelled_when(plan: list[tuple[str, int]], seed: int) -> None:
    """Each request: user, and the loop turns after which it is cancelled (0: never)."""
    dice = random.Random(seed)

    async def session() -> None:
        queue, held = FairQueue(3, 8, per_user=2), 0

        async def request(user: str) -> None:
            nonlocal held
            await queue.enter(user, 5, FOREVER)
            held += 1
            assert held <= 3
            try:
                for _ in range(dice.randrange(4)):
                    await asyncio.sleep(0)
            finally:
                held -= 1
                queue.leave(user)

        async def cancel_later(task: asyncio.Task[None], turns: int) -> None:
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()

        tasks = []
        for user, turns in plan:
            tasks.append(asyncio.create_task(request(user)))
            if turns:
                tasks.append(asyncio.create_task(cancel_later(tasks[-1], turns)))
            if dice.random() < 0.5:
                await asyncio.sleep(0)
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(end) for end in ends} <= {type(None), asyncio.CancelledError, Overloaded}
        assert (queue.running, queue.waiting) == (0, 0)

    run(session)
