"""Limits per user and key: exact, settled to what was used, and a Retry-After that is true to the nanosecond."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from inference_gateway.errors import RateLimited
from inference_gateway.limits import SECOND, RateLimits, Reservation, duration
from policy.limits import Limits

NOTHING = Limits()


class FakeClock:
    """Monotonic nanoseconds and UTC that move together, when told to."""

    def __init__(self) -> None:
        self.nanoseconds = 1_234_567_891
        self.start = datetime(2026, 11, 25, 23, 0, 0, tzinfo=UTC)

    def forward(self, nanoseconds: int) -> None:
        self.nanoseconds += nanoseconds

    def limits(self) -> RateLimits:
        def utc_now() -> datetime:
            return self.start + timedelta(microseconds=self.nanoseconds // 1000)

        return RateLimits(lambda: self.nanoseconds, utc_now)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def ask(limits: RateLimits, user: Limits, key: Limits = NOTHING, tokens: int = 10, who: str = "alice") -> Reservation:
    return limits.reserve(who, f"key-{who}", (user, key), tokens)


def refusal(limits: RateLimits, user: Limits, key: Limits = NOTHING, tokens: int = 10) -> RateLimited:
    with pytest.raises(RateLimited) as refused:
        ask(limits, user, key, tokens)
    return refused.value


def test_every_answer_of_a_request_counts_as_one_at_once(clock: FakeClock) -> None:
    limits, five = clock.limits(), (Limits(concurrent_requests=5), NOTHING)
    held = limits.reserve("alice", "key", five, 10, 3)
    with pytest.raises(RateLimited, match="your limit of 5 requests at once is reached; try again in 1 s"):
        limits.reserve("alice", "key", five, 10, 3)
    limits.reserve("alice", "key", five, 10, 2).settle(4)
    held.settle(10)
    limits.reserve("alice", "key", five, 10, 5).undo()
    with pytest.raises(RateLimited) as refused:
        limits.reserve("alice", "key", five, 10, 6)
    assert refused.value.retry_after is None
    assert str(refused.value) == (
        "this request asks for 6 answers, more than your limit of 5 requests at once will ever allow; lower n or "
        "send fewer prompts"
    )


def test_a_check_refuses_what_is_reached_and_charges_nothing(clock: FakeClock) -> None:
    limits, both = clock.limits(), (Limits(requests_per_minute=1, tokens_per_minute=10), NOTHING)
    for _ in range(3):
        limits.check("alice", "key", both)
    limits.reserve("alice", "key", both, 10).settle(10)
    with pytest.raises(RateLimited, match="your limit of 1 requests per minute is reached"):
        limits.check("alice", "key", both)


def test_a_limit_of_k_requests_per_minute_admits_k_in_any_60_seconds(clock: FakeClock) -> None:
    limits, three = clock.limits(), Limits(requests_per_minute=3)
    for _ in range(3):
        ask(limits, three)
        clock.forward(10 * SECOND)
    refused = refusal(limits, three)  # 30 s after the first
    assert (refused.code, refused.status, refused.kind, refused.limit) == (
        "rate_limit_exceeded", 429, "requests", "requests_per_minute",
    )  # fmt: skip
    assert refused.retry_after == 30
    assert str(refused) == "your limit of 3 requests per minute is reached; try again in 30 s"
    clock.forward(30 * SECOND - 1)
    assert refusal(limits, three).retry_after == 1
    clock.forward(1)
    ask(limits, three)
    assert refusal(limits, three).retry_after == 10  # the second's turn


def test_retry_after_is_the_first_whole_second_that_is_admitted(clock: FakeClock) -> None:
    limits, some = clock.limits(), Limits(tokens_per_minute=100)
    for tokens, pause in ((30, 7_777_777_777), (20, 11), (50, 2 * SECOND + 1)):
        ask(limits, some, tokens=tokens).settle(tokens)
        clock.forward(pause)
    wait = refusal(limits, some, tokens=40).retry_after
    assert wait is not None
    clock.forward((wait - 1) * SECOND)
    refusal(limits, some, tokens=40)
    clock.forward(SECOND)
    ask(limits, some, tokens=40)


def test_tokens_are_reserved_at_admission_and_settled_to_what_was_used(clock: FakeClock) -> None:
    limits, some = clock.limits(), Limits(tokens_per_minute=100, tokens_per_day=150)
    first = ask(limits, some, tokens=90)
    assert refusal(limits, some, tokens=11).limit == "tokens_per_minute"
    first.settle(20)
    second = ask(limits, some, tokens=80)
    assert refusal(limits, some, tokens=1).kind == "tokens"
    second.settle(80)
    clock.forward(60 * SECOND)
    assert refusal(limits, some, tokens=51).limit == "tokens_per_day"  # 100 of 150 are used
    ask(limits, some, tokens=50)


def test_a_day_ends_at_midnight_utc(clock: FakeClock) -> None:
    limits, some = clock.limits(), Limits(tokens_per_day=100)
    open_over_midnight = ask(limits, some, tokens=100)
    refused = refusal(limits, some, tokens=1)
    assert refused.retry_after == 3599  # it is 23:00:01.23
    assert "tokens per day (UTC)" in str(refused)
    clock.forward(3598 * SECOND)
    refusal(limits, some, tokens=1)
    clock.forward(SECOND)
    ask(limits, some, tokens=60)
    open_over_midnight.settle(5)  # gives back what yesterday held, and nothing to today
    ask(limits, some, tokens=40)
    refusal(limits, some, tokens=1)


def test_requests_at_once_count_until_they_are_over(clock: FakeClock) -> None:
    limits, two = clock.limits(), Limits(concurrent_requests=2)
    first, _ = ask(limits, two), ask(limits, two)
    clock.forward(1000 * SECOND)
    assert str(refusal(limits, two)) == "your limit of 2 requests at once is reached; try again in 1 s"
    first.settle(0)
    ask(limits, two)


def test_the_users_limit_spans_its_keys_and_a_keys_limit_is_its_own(clock: FakeClock) -> None:
    limits, user, key = clock.limits(), Limits(requests_per_minute=3), Limits(requests_per_minute=2)
    for name in ("key-1", "key-1", "key-2"):
        limits.reserve("alice", name, (user, key), 1)
    with pytest.raises(RateLimited, match="your limit of 3"):
        limits.reserve("alice", "key-2", (user, key), 1)
    with pytest.raises(RateLimited, match="this key's limit of 2"):
        limits.reserve("alice", "key-1", (NOTHING, key), 1)
    limits.reserve("bob", "key-3", (user, key), 1)


def test_a_refused_request_counts_for_nothing(clock: FakeClock) -> None:
    limits, user = clock.limits(), Limits(requests_per_minute=1, tokens_per_minute=50)
    for _ in range(5):
        refusal(limits, user, tokens=51)
    refusal(limits, NOTHING, Limits(concurrent_requests=1, tokens_per_day=5), tokens=6)
    ask(limits, user, Limits(concurrent_requests=1), tokens=50)


def test_an_undone_reservation_leaves_no_trace(clock: FakeClock) -> None:
    limits = clock.limits()
    all_of_them = Limits(1, 10, 10, 1)
    ask(limits, all_of_them, tokens=10).undo()
    ask(limits, all_of_them, tokens=10)


def test_a_request_beyond_the_whole_limit_is_told_that_waiting_cannot_help(clock: FakeClock) -> None:
    for some in (Limits(tokens_per_minute=10), Limits(tokens_per_day=10)):
        refused = refusal(clock.limits(), some, tokens=11)
        assert refused.retry_after is None
        assert "this request may use 11 tokens with its answer" in str(refused)
        assert "shorten the prompt or lower max_tokens" in str(refused)


def test_of_several_reached_limits_the_longest_wait_is_told(clock: FakeClock) -> None:
    limits, both = clock.limits(), Limits(requests_per_minute=1, concurrent_requests=1)
    ask(limits, both)
    assert refusal(limits, both).retry_after == 60


def test_fifty_at_once_get_exactly_k(clock: FakeClock) -> None:
    limits, seven = clock.limits(), Limits(requests_per_minute=7)

    async def one() -> bool:
        await asyncio.sleep(0)
        try:
            ask(limits, seven)
        except RateLimited:
            return False
        return True

    async def fifty() -> list[bool]:
        return await asyncio.gather(*(one() for _ in range(50)))

    assert sum(asyncio.run(fifty())) == 7


def test_headers_tell_the_tighter_of_the_users_and_the_keys_limits(clock: FakeClock) -> None:
    limits = clock.limits()
    both = (Limits(requests_per_minute=10, tokens_per_minute=1000), Limits(requests_per_minute=3))
    limits.reserve("alice", "key", both, 400)
    clock.forward(500_000_000)
    assert limits.headers("alice", "key", both) == {
        "x-ratelimit-limit-requests": "3",
        "x-ratelimit-remaining-requests": "2",
        "x-ratelimit-reset-requests": "59.5s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "600",
        "x-ratelimit-reset-tokens": "59.5s",
    }
    assert limits.headers("bob", "other", (NOTHING, NOTHING)) == {}


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [(0, "0s"), (1, "1ms"), (250_000_000, "250ms"), (SECOND, "1s"), (59_500_000_000, "59.5s"), (60 * SECOND, "1m0s")],
)
def test_times_are_written_as_openai_does(nanoseconds: int, text: str) -> None:
    assert duration(nanoseconds) == text


def test_somebody_without_a_key_is_held_to_the_users_limits_alone(clock: FakeClock) -> None:
    limits, both = clock.limits(), (Limits(requests_per_minute=3), Limits(requests_per_minute=1))
    for _ in range(2):
        limits.reserve("alice", None, both, 10)
    limits.reserve("alice", "key-alice", both, 10)
    with pytest.raises(RateLimited, match="your limit of 3 requests per minute is reached"):
        limits.reserve("alice", None, both, 10)
    assert limits.headers("alice", None, both)["x-ratelimit-remaining-requests"] == "0"
    limits.reserve("bob", None, both, 10)
