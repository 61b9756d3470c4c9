"""Between the routes and the engine: limits, a fair queue with a bound, deadlines, and the measuring of every answer.

A request reserves its tokens at once; each of its answers then waits for a place of its own.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Self

from inference_gateway import request_record
from inference_gateway.engine.base import Engine, Event, Failed, Finished, GenerationRequest, Shares, Tokens
from inference_gateway.errors import RateLimited, Refused
from inference_gateway.fair_queue import FairQueue
from inference_gateway.limits import RateLimits, Reservation
from inference_gateway.metrics import Metrics
from inference_gateway.settings import Settings
from policy.keys import Principal
from policy.limits import Limits


class Admission:
    """One gateway's door to its engine. For one event loop."""

    def __init__(self, settings: Settings, metrics: Metrics, limits: RateLimits | None = None):
        self.settings = settings
        self.metrics = metrics
        self.queue = FairQueue(settings.max_concurrent, settings.max_waiting, settings.places_per_user)
        self._limits = limits or RateLimits()

    def admit(
        self,
        principal: Principal,
        limits: tuple[Limits, Limits],
        *,
        prompt_tokens: int,
        max_tokens: int,
        answers: int = 1,
        model: str = "",
    ) -> "Ticket":
        """Reserve ``prompt_tokens`` + ``max_tokens``, those of all ``answers``, until the caller closes the ticket.

        ``limits``: what the policy sets for the user and for the key. Raises RateLimited; then nothing is counted.
        """
        request_record.current().fields["prompt_tokens"] = prompt_tokens
        who, mine = (principal.user_id, principal.key_id), self._over_defaults(limits)
        with self._told(who, mine):
            reservation = self._limits.reserve(*who, mine, prompt_tokens + max_tokens, answers)
        return Ticket(self, principal.user_id, reservation, model)

    def check(self, principal: Principal, limits: tuple[Limits, Limits], answers: int) -> None:
        """Before any work for a body with ``answers`` or more to each prompt: what ``admit`` would refuse whatever the
        prompt. Raises RateLimited.
        """
        who, mine = (principal.user_id, principal.key_id), self._over_defaults(limits)
        with self._told(who, mine):
            self._limits.check(*who, mine, answers)

    def _over_defaults(self, limits: tuple[Limits, Limits]) -> tuple[Limits, Limits]:
        defaults = self.settings.limits
        return limits[0].over(defaults.user.limits()), limits[1].over(defaults.key.limits())

    @contextmanager
    def _told(self, who: tuple[str, str | None], limits: tuple[Limits, Limits]) -> Iterator[None]:
        """Counts a refusal, and leaves the limits' headers for the response."""
        try:
            yield
        except RateLimited as refusal:
            self.metrics.refused(refusal)
            raise
        finally:
            request_record.current().headers |= self._limits.headers(*who, limits)


class Ticket:
    """Leave to generate the answers to one request; a context manager that closes it."""

    def __init__(self, admission: Admission, user_id: str, reservation: Reservation, model: str):
        self._admission = admission
        self._user_id = user_id
        self._reservation = reservation
        self._model = model
        self._arrived = time.perf_counter()
        self._deadline = asyncio.get_running_loop().time() + admission.settings.request_timeout_seconds
        self._record = request_record.current()
        self._complete: set[str] = set()
        # Tokens of the prompts that had a place, by the identity of the prompt: its choices share one tuple.
        self._begun: dict[int, int] = {}
        self._waiting: set[asyncio.Timeout] = set()
        self._closed = False
        self.generated = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Settle the limits, once the answers are over: what never had a place counts for nothing. May be repeated."""
        if self._closed:
            return
        self._closed = True
        if self._begun:
            self._reservation.settle(sum(self._begun.values()) + self.generated)
        else:
            self._reservation.undo()
        self._record.fields["completion_tokens"] = self.generated

    def complete(self, request_id: str) -> None:
        """The answer needs no further token, though the engine would go on: its text has met a stop string."""
        self._complete.add(request_id)

    async def generate(self, engine: Engine, request: GenerationRequest) -> AsyncGenerator[Event]:
        """Wait for a place, then the engine's events, counted and measured.

        Raises Overloaded and QueueTimeout; ends with ``request_timeout`` when the deadline passes.
        """
        settings, metrics, queue = self._admission.settings, self._admission.metrics, self._admission.queue
        traced = self._record.trace.answer()
        with traced.waiting():
            await self._enter(request.prompt)
        measured = metrics.answer(self._model, self._arrived, len(request.prompt))
        end: Finished | Failed | None = None
        totals: Shares | None = None
        try:
            asked = replace(request, attribution=request.attribution or settings.count_all_shares)
            async with aclosing(engine.generate(asked)) as events:
                while end is None:
                    event = await self._next(events)
                    if isinstance(event, Tokens):
                        self.generated += len(event.ids)
                        queue.count(self._user_id, len(event.ids))
                        measured.tokens(len(event.ids))
                        traced.tokens(len(event.ids))
                        totals = event.totals
                    else:
                        end = event
                    yield event if request.attribution else _without_shares(event)
        except Exception as error:
            end = Failed(getattr(error, "code", "internal_error"), str(error))
            raise
        finally:
            queue.leave(self._user_id)
            reason = "stop" if request.request_id in self._complete else "abort"
            if end is not None:
                reason = end.reason if isinstance(end, Finished) else end.code
            shares = end.shares if isinstance(end, Finished) else totals
            measured.shares(shares)
            measured.ended(reason)
            traced.ended(reason, shares if settings.count_all_shares else None)
            self._record.fields["reason"] = reason
            if measured.first_token_ms is not None:
                self._record.fields.setdefault("first_token_ms", measured.first_token_ms)

    async def _enter(self, prompt: tuple[int, ...]) -> None:
        """Once one answer has begun, the others wait as long as the request may take, however full it is."""
        left = max(0.0, self._deadline - asyncio.get_running_loop().time())
        patience = left if self._begun else min(self._admission.settings.queue_timeout_seconds, left)
        try:
            await self._admission.queue.enter(self._user_id, len(prompt), patience, self._waiting)
        except Refused as refusal:
            self._admission.metrics.refused(refusal)
            self._record.fields["reason"] = refusal.code
            raise
        self._begun[id(prompt)] = len(prompt)
        for other in self._waiting:
            if not other.expired():
                other.reschedule(self._deadline)
        waited = time.perf_counter() - self._arrived
        self._record.has_place = True
        self._record.fields.setdefault("queue_ms", round(1000 * waited, 1))
        self._admission.metrics.admitted(self._model, waited)

    async def _next(self, events: AsyncGenerator[Event]) -> Event:
        try:
            async with asyncio.timeout_at(self._deadline):
                return await anext(events)
        except TimeoutError:
            seconds = self._admission.settings.request_timeout_seconds
            return Failed("request_timeout", f"the answer took longer than the {seconds:g} s that this gateway allows")


def _without_shares(event: Event) -> Event:
    if isinstance(event, Tokens) and (event.shares or event.totals is not None):
        return replace(event, shares=(), totals=None)
    if isinstance(event, Finished) and event.shares is not None:
        return replace(event, shares=None)
    return event
