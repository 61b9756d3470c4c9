"""Limits per user and per key, exact within one process: what is reserved at admission is settled at the end.

A minute is any 60 seconds, counted from admission to admission; a day is a day in UTC. The counts live in memory, and
a restart forgets them. Everything here runs on the gateway's event loop and never awaits, so a decision and its charge
are one step whatever runs beside it.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from inference_gateway.errors import RateLimited
from policy.limits import Limits

SECOND = 1_000_000_000
MINUTE = 60 * SECOND

NAMED = {
    "requests_per_minute": "requests per minute",
    "tokens_per_minute": "tokens per minute",
    "tokens_per_day": "tokens per day (UTC)",
    "concurrent_requests": "requests at once",
}


@dataclass(eq=False)
class Charge:
    """One request in a ledger; ``at`` is its admission, ``tokens`` what it reserved, or used once it is over."""

    at: int
    day: date
    tokens: int
    answers: int


class Ledger:
    """What one user or one key has asked for lately."""

    def __init__(self) -> None:
        self.recent: deque[Charge] = deque()
        self.open = 0
        self.day = date.min
        self.day_tokens = 0

    def advance(self, now: int, today: date) -> None:
        """Let go of what no limit counts any more."""
        while self.recent and self.recent[0].at + MINUTE <= now:
            self.recent.popleft()
        if self.day != today:
            self.day, self.day_tokens = today, 0

    @property
    def minute_tokens(self) -> int:
        return sum(charge.tokens for charge in self.recent)

    def take(self, charge: Charge) -> None:
        self.recent.append(charge)
        self.open += charge.answers
        self.day_tokens += charge.tokens

    def settle(self, charge: Charge, tokens: int) -> None:
        """The request is over and has used ``tokens``."""
        self.open -= charge.answers
        self._correct(charge, tokens)

    def undo(self, charge: Charge) -> None:
        """The request never began: it counts for nothing."""
        self.settle(charge, 0)
        if charge in self.recent:
            self.recent.remove(charge)

    def _correct(self, charge: Charge, tokens: int) -> None:
        if charge.day == self.day:
            self.day_tokens += tokens - charge.tokens
        charge.tokens = tokens


@dataclass(frozen=True)
class Holder:
    """Whose limits: ``whose`` is how a message names them."""

    whose: str
    limits: Limits
    ledger: Ledger


@dataclass(frozen=True)
class Excess:
    """A limit without room. ``wait``: nanoseconds until there is room at the latest; None: there never will be."""

    whose: str
    name: str
    limit: int
    wait: int | None


class Reservation:
    """An admitted request's hold on the limits. End it once, by ``settle`` or ``undo``."""

    def __init__(self, holders: tuple[Holder, ...], charges: tuple[Charge, ...]):
        self._holders = holders
        self._charges = charges

    def settle(self, tokens: int) -> None:
        """Charge what was used instead of what was reserved."""
        for holder, charge in zip(self._holders, self._charges, strict=True):
            holder.ledger.settle(charge, tokens)

    def undo(self) -> None:
        """As if it had not been asked for."""
        for holder, charge in zip(self._holders, self._charges, strict=True):
            holder.ledger.undo(charge)


class RateLimits:
    """The ledgers of all users and keys. ``clock``: monotonic nanoseconds; ``today``: the time in UTC."""

    def __init__(
        self,
        clock: Callable[[], int] = time.monotonic_ns,
        utc_now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ):
        self._clock = clock
        self._utc_now = utc_now
        self._ledgers: dict[str, Ledger] = {}

    def check(self, user_id: str, key_id: str | None, limits: tuple[Limits, Limits], answers: int = 1) -> None:
        """Whether ``reserve`` would refuse a request whatever its tokens. Charges nothing. Raises RateLimited."""
        now, utc = self._clock(), self._utc_now()
        _require_room(self._holders(user_id, key_id, limits, now, utc), now, utc, 0, answers)

    def reserve(
        self, user_id: str, key_id: str | None, limits: tuple[Limits, Limits], tokens: int, answers: int = 1
    ) -> Reservation:
        """Admit a request for ``answers`` that may use ``tokens`` under the user's and the key's limits, both or none.

        Each answer counts as one of the requests at once. Raises RateLimited for the limit that takes longest to have
        room.
        """
        now, utc = self._clock(), self._utc_now()
        holders = self._holders(user_id, key_id, limits, now, utc)
        _require_room(holders, now, utc, tokens, answers)
        charges = tuple(Charge(now, utc.date(), tokens, answers) for _ in holders)
        for holder, charge in zip(holders, charges, strict=True):
            holder.ledger.take(charge)
        return Reservation(holders, charges)

    def headers(self, user_id: str, key_id: str | None, limits: tuple[Limits, Limits]) -> dict[str, str]:
        """OpenAI's x-ratelimit-* headers: of the user's and the key's limits per minute, the one with less left."""
        now, utc = self._clock(), self._utc_now()
        holders = self._holders(user_id, key_id, limits, now, utc)
        found: dict[str, str] = {}
        for what in ("requests", "tokens"):
            left = [
                (max(0, limit - used), limit, holder.ledger)
                for holder in holders
                if (limit := getattr(holder.limits, f"{what}_per_minute")) is not None
                for used in [len(holder.ledger.recent) if what == "requests" else holder.ledger.minute_tokens]
            ]
            if left:
                remaining, limit, ledger = min(left, key=lambda one: one[:2])
                reset = ledger.recent[-1].at + MINUTE - now if ledger.recent else 0
                found |= {
                    f"x-ratelimit-limit-{what}": str(limit),
                    f"x-ratelimit-remaining-{what}": str(remaining),
                    f"x-ratelimit-reset-{what}": duration(reset),
                }
        return found

    def _holders(
        self, user_id: str, key_id: str | None, limits: tuple[Limits, Limits], now: int, utc: datetime
    ) -> tuple[Holder, ...]:
        names = (f"user:{user_id}", None if key_id is None else f"key:{key_id}")
        holders = tuple(
            Holder(whose, limit, self._ledgers.setdefault(name, Ledger()))
            for whose, name, limit in zip(("your", "this key's"), names, limits, strict=True)
            if name is not None
        )
        for holder in holders:
            holder.ledger.advance(now, utc.date())
        return holders


def duration(nanoseconds: int) -> str:
    """As OpenAI writes times: ``250ms``, ``1s``, ``59.5s``, ``1m0s``."""
    milliseconds = -(-nanoseconds // 1_000_000)
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds else "0s"
    minutes, rest = divmod(milliseconds, 60_000)
    seconds = f"{rest / 1000:.3f}".rstrip("0").rstrip(".")
    return f"{minutes}m{seconds}s" if minutes else f"{seconds}s"


def _require_room(holders: tuple[Holder, ...], now: int, utc: datetime, tokens: int, answers: int) -> None:
    excess = [one for holder in holders for one in _excess(holder, now, utc, tokens, answers)]
    if excess:
        raise _refusal(excess, tokens, answers)


def _excess(holder: Holder, now: int, utc: datetime, tokens: int, answers: int) -> Iterable[Excess]:
    limits, ledger = holder.limits, holder.ledger

    def excess(name: str, wait: int | None) -> Excess:
        return Excess(holder.whose, name, getattr(limits, name), wait)

    if limits.concurrent_requests is not None and ledger.open + answers > limits.concurrent_requests:
        # Nobody knows when one of them ends.
        yield excess("concurrent_requests", None if answers > limits.concurrent_requests else SECOND)
    if limits.requests_per_minute is not None and len(ledger.recent) >= limits.requests_per_minute:
        last_to_leave = ledger.recent[len(ledger.recent) - limits.requests_per_minute]
        yield excess("requests_per_minute", last_to_leave.at + MINUTE - now)
    if limits.tokens_per_minute is not None:
        wait = _wait_for_tokens(ledger, limits.tokens_per_minute, now, tokens)
        if wait != 0:
            yield excess("tokens_per_minute", wait)
    if limits.tokens_per_day is not None and ledger.day_tokens + tokens > limits.tokens_per_day:
        midnight = datetime.combine(utc.date() + timedelta(days=1), datetime.min.time(), UTC)
        wait = (midnight - utc) // timedelta(microseconds=1) * 1000
        yield excess("tokens_per_day", None if tokens > limits.tokens_per_day else wait)


def _wait_for_tokens(ledger: Ledger, limit: int, now: int, tokens: int) -> int | None:
    """Nanoseconds until ``tokens`` fit when no request uses less than it reserved; None: they never fit."""
    if tokens > limit:
        return None
    over = ledger.minute_tokens + tokens - limit
    wait = 0
    for charge in ledger.recent:
        if over <= 0:
            break
        over -= charge.tokens
        wait = charge.at + MINUTE - now
    return wait


def _refusal(excess: list[Excess], tokens: int, answers: int) -> RateLimited:
    worst = max(excess, key=lambda one: float("inf") if one.wait is None else one.wait)
    limit = f"{worst.whose} limit of {worst.limit} {NAMED[worst.name]}"
    if worst.wait is None and worst.name == "concurrent_requests":
        return RateLimited(
            f"this request asks for {answers} answers, more than {limit} will ever allow; lower n or "
            "send fewer prompts",
            worst.name,
            None,
        )
    if worst.wait is None:
        return RateLimited(
            f"this request may use {tokens} tokens with its answer, more than {limit} will ever allow; shorten the "
            "prompt or lower max_tokens",
            worst.name,
            None,
        )
    seconds = max(1, -(-worst.wait // SECOND))
    return RateLimited(f"{limit} is reached; try again in {seconds} s", worst.name, seconds)
