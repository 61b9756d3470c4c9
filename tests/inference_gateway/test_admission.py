"""Admission with an engine of scripted answers: what is reserved, given back, measured, and when a deadline passes."""

import asyncio
import re
import tomllib
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from inference_gateway.admission import Admission, Ticket
from inference_gateway.engine.base import Event, Failed, Finished, GenerationRequest, Shares, Tokens, TokenShares
from inference_gateway.errors import EngineStopped, Overloaded, QueueTimeout, RateLimited
from inference_gateway.metrics import Metrics
from inference_gateway.settings import DefaultLimits, Settings, SubjectLimits
from policy.keys import Principal
from policy.limits import Limits

ALICE = Principal("alice", "key-a", frozenset(), frozenset({"chat"}))
BOB = Principal("bob", "key-b", frozenset(), frozenset({"chat"}))
UNSET = (Limits(), Limits())
SHARES = Shares({"clinic": 3}, {"clinic": 3}, 4, 4)


class ScriptedEngine:
    """Yields what it is given; an event that is None never comes. Remembers what it was asked and what was closed."""

    def __init__(self, *events: Event | None):
        self.events = events
        self.asked: list[GenerationRequest] = []
        self.closed: list[str] = []

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        self.asked.append(request)
        try:
            for event in self.events:
                if event is None:
                    await asyncio.Event().wait()
                else:
                    yield event
        finally:
            self.closed.append(request.request_id)


@cache
def prompt_of(tokens: int) -> tuple[int, ...]:
    return tuple(range(tokens))  # one tuple for all choices of a prompt


def request(request_id: str = "r1", prompt: int = 4, max_tokens: int = 10, attribution: bool = False) -> Any:
    return GenerationRequest(
        request_id, prompt_of(prompt), max_tokens, frozenset(), "per_token", attribution=attribution
    )


def door(**settings: Any) -> Admission:
    return Admission(Settings(directory=Path("."), **settings), Metrics())


def admit(admission: Admission, who: Principal = ALICE, limits: Any = UNSET, **asked: Any) -> Ticket:
    return admission.admit(who, limits, **({"prompt_tokens": 4, "max_tokens": 10, "model": "tiny"} | asked))


async def read(ticket: Ticket, engine: Any, asked: GenerationRequest) -> list[Event]:
    async with aclosing(ticket.generate(engine, asked)) as events:
        return [event async for event in events]


def run(test: Callable[[], Awaitable[Any]]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(test(), 60)

    return asyncio.run(bounded())


def value(admission: Admission, name: str, **labels: str) -> float | None:
    for family in text_string_to_metric_families(admission.metrics.render().decode()):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return sample.value
    return None


def test_an_answer_is_charged_by_its_tokens_and_its_reservation_comes_back() -> None:
    async def session() -> None:
        admission, limits = door(), (Limits(tokens_per_minute=20), Limits())
        engine = ScriptedEngine(Tokens((1, 2)), Finished("stop"))
        with admit(admission, limits=limits) as ticket:  # 14 reserved
            with pytest.raises(RateLimited):
                admit(admission, limits=limits)
            await read(ticket, engine, request())
            assert ticket.generated == 2
        with admit(admission, limits=limits) as ticket:  # 4 + 2 used, 14 more
            await read(ticket, engine, request())
        with pytest.raises(RateLimited):  # 12 used
            admit(admission, limits=limits, max_tokens=5)
        admit(admission, limits=limits, max_tokens=4).close()

    run(session)


def test_defaults_count_where_the_policy_sets_nothing_and_the_policy_wins_where_it_does() -> None:
    async def session() -> None:
        defaults = DefaultLimits(user=SubjectLimits(concurrent_requests=1), key=SubjectLimits(requests_per_minute=5))
        admission = door(limits=defaults)
        with admit(admission), admit(admission, BOB):
            with pytest.raises(RateLimited, match="your limit of 1 requests at once"):
                admit(admission)
            second = admit(admission, limits=(Limits(concurrent_requests=2), Limits()))
            with pytest.raises(RateLimited, match="this key's limit of 2 requests per minute"):
                admit(admission, limits=(Limits(concurrent_requests=9), Limits(requests_per_minute=2)))
            second.close()

    run(session)


def test_fifty_parallel_requests_under_a_limit_of_seven_at_once_are_seven() -> None:
    async def session() -> None:
        admission, limits = door(max_concurrent=64), (Limits(concurrent_requests=7), Limits())

        async def one() -> Ticket | RateLimited:
            await asyncio.sleep(0)
            try:
                return admit(admission, limits=limits)
            except RateLimited as refusal:
                return refusal

        ends = await asyncio.gather(*(one() for _ in range(50)))
        tickets = [end for end in ends if isinstance(end, Ticket)]
        assert len(tickets) == 7
        for ticket in tickets:
            ticket.close()
        admit(admission, limits=limits).close()

    run(session)


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({}, 3),
        ({"max_concurrent_per_user": 2}, 2),
        ({"max_concurrent_per_user": 9}, 4),
        ({"max_concurrent": 1}, 1),
    ],
)
def test_one_user_gets_all_places_but_one_unless_the_operator_says_otherwise(
    settings: dict[str, int], most: int
) -> None:
    async def session() -> None:
        admission, engine = door(**({"max_concurrent": 4} | settings)), ScriptedEngine(None)
        ticket = admit(admission, answers=9)
        answers = [asyncio.create_task(read(ticket, engine, request(f"r{i}"))) for i in range(9)]
        while len(engine.asked) < most:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (admission.queue.running, admission.queue.waiting) == (most, 9 - most)
        for answer in answers:
            answer.cancel()
        await asyncio.gather(*answers, return_exceptions=True)
        ticket.close()

    run(session)


def test_an_answer_that_never_had_a_place_is_charged_nothing() -> None:
    async def session() -> None:
        limits = (Limits(requests_per_minute=2), Limits())
        admission = door(max_concurrent=1, max_waiting=1, queue_timeout_seconds=0.01)
        engine = ScriptedEngine(Tokens((1,)), Finished("stop"))
        holder = ScriptedEngine(Tokens((1,)), None)
        with admit(admission, BOB) as held:
            async with aclosing(held.generate(holder, request("held"))) as events:
                await anext(events)
                with admit(admission, limits=limits) as ticket, pytest.raises(QueueTimeout):
                    await read(ticket, engine, request())
                with admit(admission, BOB) as other:
                    waiting = asyncio.create_task(read(other, engine, request("waits")))
                    await asyncio.sleep(0)
                    with admit(admission, limits=limits) as ticket, pytest.raises(Overloaded):
                        await read(ticket, engine, request())
                    waiting.cancel()
                    await asyncio.gather(waiting, return_exceptions=True)
        assert (admission.queue.running, admission.queue.waiting, engine.asked) == (0, 0, [])
        for _ in range(2):
            with admit(admission, limits=limits) as ticket:
                await read(ticket, engine, request())
        assert value(admission, "seqr_requests_refused_total", reason="queue_timeout") == 1
        assert value(admission, "seqr_requests_refused_total", reason="overloaded") == 1

    run(session)


def test_closing_a_grant_twice_settles_once() -> None:
    async def session() -> None:
        admission, limits = door(), (Limits(concurrent_requests=2), Limits())
        first, second = admit(admission, limits=limits), admit(admission, limits=limits)
        first.close()
        first.close()
        third = admit(admission, limits=limits)
        with pytest.raises(RateLimited):
            admit(admission, limits=limits)
        second.close()
        third.close()

    run(session)


def test_an_answer_that_takes_too_long_ends_with_request_timeout_and_leaves_the_engine() -> None:
    async def session() -> None:
        admission, engine = door(request_timeout_seconds=0.05), ScriptedEngine(Tokens((1,)), None)
        with admit(admission) as ticket:
            events = await read(ticket, engine, request())
        assert events[0] == Tokens((1,))
        assert events[1] == Failed("request_timeout", "the answer took longer than the 0.05 s that this gateway allows")
        assert engine.closed == ["r1"] and len(events) == 2
        assert value(admission, "seqr_answers_failed_total", code="request_timeout") == 1

    run(session)


def test_waiting_counts_towards_the_deadline_of_the_request() -> None:
    async def session() -> None:
        admission = door(max_concurrent=1, request_timeout_seconds=0.05)
        with admit(admission, BOB) as held, admit(admission) as ticket:
            async with aclosing(held.generate(ScriptedEngine(Tokens((1,)), None), request("held"))) as events:
                await anext(events)
                with pytest.raises(QueueTimeout):
                    await read(ticket, ScriptedEngine(), request())

    run(session)


def test_the_answers_of_one_request_take_a_place_each_and_are_charged_together() -> None:
    async def session() -> None:
        admission, limits = door(max_concurrent=3), (Limits(tokens_per_day=50), Limits())
        engine = ScriptedEngine(Tokens((1, 2, 3)), Finished("length"))
        most = 0

        async def one(ticket: Ticket, name: str) -> None:
            nonlocal most
            async with aclosing(ticket.generate(engine, request(name))) as events:
                async for _ in events:
                    most = max(most, admission.queue.running)
                    await asyncio.sleep(0)

        with admit(admission, limits=limits, max_tokens=30) as ticket:
            await asyncio.gather(*(one(ticket, f"r{number}") for number in range(3)))
            assert (ticket.generated, most) == (9, 2)
        assert admission.queue.running == 0
        assert value(admission, "vllm:request_success_total", finished_reason="length") == 3
        admit(admission, limits=limits, max_tokens=50 - 4 - 13).close()  # 4 + 9 of 50 are used
        with pytest.raises(RateLimited):
            admit(admission, limits=limits, max_tokens=50 - 4 - 12)

    run(session)


class SlowEngine(ScriptedEngine):
    """Ends every answer after ``seconds``."""

    def __init__(self, seconds: float):
        super().__init__()
        self._seconds = seconds

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        await asyncio.sleep(self._seconds)
        yield Finished("stop")


def test_answers_of_one_request_do_not_time_out_behind_each_other() -> None:
    async def session() -> None:
        admission = door(max_concurrent=1, queue_timeout_seconds=0.05)
        with admit(admission) as ticket:
            ends = await asyncio.gather(*(read(ticket, SlowEngine(0.1), request(f"r{number}")) for number in range(3)))
        assert ends == [[Finished("stop")]] * 3

    run(session)


def test_answers_that_wait_already_are_patient_once_one_of_their_request_has_begun() -> None:
    async def session() -> None:
        admission = door(max_concurrent=1, queue_timeout_seconds=0.2)
        with admit(admission, BOB) as other, admit(admission) as ticket:
            async with aclosing(other.generate(ScriptedEngine(Tokens((1,)), None), request("held"))) as events:
                await anext(events)
                waiting = [asyncio.create_task(read(ticket, SlowEngine(0.4), request(name))) for name in ("r1", "r2")]
                await asyncio.sleep(0)
                assert admission.queue.waiting == 2
            assert await asyncio.gather(*waiting) == [[Finished("stop")]] * 2

    run(session)


def test_only_the_prompts_that_had_a_place_are_charged() -> None:
    async def session() -> None:
        admission = door(max_concurrent=1, max_waiting=0)
        limits = (Limits(tokens_per_day=100), Limits())
        engine = ScriptedEngine(Tokens((1,)), Finished("stop"))
        with admit(admission, limits=limits, prompt_tokens=4 + 60, max_tokens=20) as ticket:
            async with aclosing(ticket.generate(engine, request("begins"))) as events:
                await anext(events)
                with pytest.raises(Overloaded):
                    await read(ticket, engine, request("refused", prompt=60))
                async for _ in events:
                    pass
        admit(admission, limits=limits, prompt_tokens=95, max_tokens=0).close()  # 4 + 1 of 100 are used
        with pytest.raises(RateLimited):
            admit(admission, limits=limits, prompt_tokens=96, max_tokens=0)

    run(session)


def test_an_engine_that_raises_counts_as_failed_and_not_as_left_by_the_client() -> None:
    async def session() -> None:
        admission = door()

        class Breaks(ScriptedEngine):
            def __init__(self, error: Exception):
                super().__init__()
                self._error = error

            async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event]:
                yield Tokens((1,))
                raise self._error

        for error, code in ((EngineStopped("gone"), "engine_stopped"), (ValueError("?"), "internal_error")):
            with admit(admission) as ticket, pytest.raises(type(error)):
                await read(ticket, Breaks(error), request())
            assert value(admission, "seqr_answers_failed_total", code=code) == 1
        assert value(admission, "vllm:request_success_total") is None
        assert admission.queue.running == 0

    run(session)


def test_an_answer_is_counted_by_how_it_ends() -> None:
    async def session() -> None:
        admission = door()
        scripts: list[tuple[Event, ...]] = [
            (Tokens((1, 2)), Tokens((3,)), Finished("stop")),
            (Tokens((1,)), Finished("length")),
            (Failed("permission_revoked", "over"),),
        ]
        for script in scripts:
            with admit(admission) as ticket:
                await read(ticket, ScriptedEngine(*script), request())
        with admit(admission) as ticket:  # the client leaves after a token
            async with aclosing(ticket.generate(ScriptedEngine(Tokens((1,)), None), request("left"))) as events:
                await anext(events)
        with admit(admission) as ticket:  # a stop string
            async with aclosing(ticket.generate(ScriptedEngine(Tokens((1,)), None), request("full"))) as events:
                await anext(events)
                ticket.complete("full")
        for reason, count in (("stop", 2), ("length", 1), ("abort", 1)):
            assert value(admission, "vllm:request_success_total", finished_reason=reason, model_name="tiny") == count
        assert value(admission, "seqr_answers_failed_total", code="permission_revoked") == 1
        assert value(admission, "vllm:generation_tokens_total") == 6
        assert value(admission, "vllm:prompt_tokens_total") == 4 * 4  # not that of the one without a token
        assert value(admission, "vllm:time_to_first_token_seconds_count") == 4
        assert value(admission, "vllm:inter_token_latency_seconds_count") == 1
        assert value(admission, "vllm:e2e_request_latency_seconds_count") == 3
        assert value(admission, "vllm:request_queue_time_seconds_count") == 5

    run(session)


@pytest.mark.parametrize("everything", [True, False])
def test_shares_are_counted_for_the_operator_and_told_only_to_who_asked(everything: bool) -> None:
    async def session() -> None:
        admission = door(count_all_shares=everything)
        token = Tokens((1,), shares=(TokenShares({"clinic": 3}, 4, None),), totals=SHARES)
        engine = ScriptedEngine(token, Finished("stop", SHARES))
        with admit(admission) as ticket:
            assert await read(ticket, engine, request()) == [Tokens((1,)), Finished("stop")]
        assert engine.asked[0].attribution is everything
        with admit(admission) as ticket:
            assert await read(ticket, engine, request(attribution=True)) == [token, Finished("stop", SHARES)]
        assert value(admission, "seqr_routing_choices_total", silo="clinic") == 6
        assert value(admission, "seqr_routing_choices_total", silo="") == 2

    run(session)


@pytest.mark.parametrize("end", ["a stop string", "a client that leaves", "a failure"])
def test_shares_are_counted_up_to_where_an_answer_ends_however_it_ends(end: str) -> None:
    async def session() -> None:
        admission = door(count_all_shares=True)
        first, second = (Tokens((1,), totals=totals) for totals in (Shares({"clinic": 1}, {}, 2, 0), SHARES))
        last = Failed("permission_revoked", "over") if end == "a failure" else None
        with admit(admission) as ticket:
            async with aclosing(ticket.generate(ScriptedEngine(first, second, last), request("r"))) as events:
                assert [await anext(events), await anext(events)] == [Tokens((1,))] * 2
                if end == "a stop string":
                    ticket.complete("r")
                elif end == "a failure":
                    assert await anext(events) == last
        assert value(admission, "seqr_routing_choices_total", silo="clinic") == 3
        assert value(admission, "seqr_routing_choices_total", silo="") == 1

    run(session)


def test_the_limits_in_the_operators_page_are_settings() -> None:
    page = (Path(__file__).parents[2] / "docs" / "operator.md").read_text()
    toml = re.search(r"```toml\n(.*?)```", page, re.DOTALL)
    assert toml is not None
    settings = Settings(directory=Path("."), **tomllib.loads(toml[1]))
    assert settings.limits.user.limits() == Limits(60, 40_000, 1_000_000, 8)
    assert settings.limits.key.limits() == Limits(concurrent_requests=4)


def test_the_operators_page_names_every_setting_of_the_gateway() -> None:
    page = (Path(__file__).parents[2] / "docs" / "operator.md").read_text()
    part = page.partition("## The gateway's settings\n")[2].partition("\n## The coordinator's settings")[0]
    part += page.partition("## Limits and fairness\n")[2].partition("\n## ")[0]
    named = set(re.findall(r"[`\[](\w+)[`.\]]", part))
    assert set(Settings.model_fields) - {"directory"} <= named
