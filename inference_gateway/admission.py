"""Between the routes and the engine: limits, a fair queue with a bound, deadlines, and the measuring of every answer.

A request is admitted once and may then generate several answers (``n``), each in a place of its own.
"""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Self

from inference_gateway import request_record
from inference_gateway.engine.base import Engine, Event, Failed, Finished, GenerationRequest, Tokens
from inference_gateway.errors import Refused
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
        self.queue = FairQueue(settings.max_concurrent, settings.max_waiting)
        self._limits = limits or RateLimits()

    async def admit(
        self,
        principal: Principal,
        limits: tuple[Limits, Limits],
        *,
        prompt_tokens: int,
        max_tokens: int,
        answers: int = 1,
        model: str = "",
    ) -> "Grant":
        """Reserve ``prompt_tokens`` + ``max_tokens``, those of all answers, and wait for a place for each answer.

        ``limits``: what the policy sets for the user and for the key. The caller closes the grant, which gives places
        and unused tokens back. Raises RateLimited, Overloaded, QueueTimeout; then nothing is counted.
        """
        arrived, record = time.perf_counter(), request_record.current()
        deadline = asyncio.get_running_loop().time() + self.settings.request_timeout_seconds
        defaults = self.settings.limits
        mine = (limits[0].over(defaults.user.limits()), limits[1].over(defaults.key.limits()))
        who = (principal.user_id, principal.key_id)
        record.fields["prompt_tokens"] = prompt_tokens
        try:
            reservation = self._limits.reserve(*who, mine, prompt_tokens + max_tokens)
            places = await self._wait(principal.user_id, answers, prompt_tokens, reservation)
        except Refused as refusal:
            self.metrics.refused(refusal)
            raise
        finally:
            record.headers |= self._limits.headers(*who, mine)
        waited = time.perf_counter() - arrived
        record.fields["queue_ms"] = round(1000 * waited, 1)
        self.metrics.admitted(model, waited)
        return Grant(self, principal.user_id, places, reservation, prompt_tokens, model, arrived, deadline)

    async def _wait(self, user_id: str, places: int, tokens: int, reservation: Reservation) -> int:
        patience = min(self.settings.queue_timeout_seconds, self.settings.request_timeout_seconds)
        try:
            return await self.queue.enter(user_id, places, tokens, patience)
        except BaseException:
            reservation.undo()
            raise


class Grant:
    """An admitted request's leave to use the engine; a context manager that closes it."""

    def __init__(
        self,
        admission: Admission,
        user_id: str,
        places: int,
        reservation: Reservation,
        prompt_tokens: int,
        model: str,
        arrived: float,
        deadline: float,
    ):
        self._admission = admission
        self._user_id = user_id
        self._places = places
        self._reservation = reservation
        self._prompt_tokens = prompt_tokens
        self._model = model
        self._arrived = arrived
        self._deadline = deadline
        self._record = request_record.current()
        self._complete: set[str] = set()
        self._closed = False
        self.generated = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the places back and settle the limits; the answers must be over. Closing again does nothing."""
        if self._closed:
            return
        self._closed = True
        self._admission.queue.leave(self._user_id, self._places)
        self._reservation.settle(self._prompt_tokens + self.generated)
        self._record.fields["completion_tokens"] = self.generated

    def complete(self, request_id: str) -> None:
        """The answer needs no further token, though the engine would go on: its text has met a stop string."""
        self._complete.add(request_id)

    async def generate(self, engine: Engine, request: GenerationRequest) -> AsyncGenerator[Event]:
        """The engine's events, counted and measured; ends with ``request_timeout`` when the deadline passes."""
        settings, metrics = self._admission.settings, self._admission.metrics
        measured = metrics.answer(self._model, self._arrived, len(request.prompt))
        end: Finished | Failed | None = None
        try:
            asked = replace(request, attribution=request.attribution or settings.count_all_shares)
            async with aclosing(engine.generate(asked)) as events:
                while end is None:
                    event = await self._next(events)
                    if isinstance(event, Tokens):
                        self.generated += len(event.ids)
                        self._admission.queue.count(self._user_id, len(event.ids))
                        measured.tokens(len(event.ids))
                    else:
                        end = event
                        measured.shares(event.shares if isinstance(event, Finished) else None)
                    yield event if request.attribution else _without_shares(event)
        finally:
            reason = "stop" if request.request_id in self._complete else "abort"
            if end is not None:
                reason = end.reason if isinstance(end, Finished) else end.code
            measured.ended(reason)
            self._record.fields["reason"] = reason
            if measured.first_token_ms is not None:
                self._record.fields.setdefault("first_token_ms", measured.first_token_ms)

    async def _next(self, events: AsyncGenerator[Event]) -> Event:
        try:
            async with asyncio.timeout_at(self._deadline):
                return await anext(events)
        except TimeoutError:
            seconds = self._admission.settings.request_timeout_seconds
            return Failed("request_timeout", f"the answer took longer than the {seconds:g} s that this gateway allows")


def _without_shares(event: Event) -> Event:
    if isinstance(event, Tokens) and event.shares:
        return replace(event, shares=())
    if isinstance(event, Finished) and event.shares is not None:
        return replace(event, shares=None)
    return event
