"""The answers to one body as they are written: pieces of all choices, in the order in which they come."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass

from fastapi.concurrency import run_in_threadpool

from inference_gateway.admission import Ticket
from inference_gateway.api.admitted import admitted
from inference_gateway.api.asking import Asked
from inference_gateway.engine.base import (
    Failed,
    Finished,
    GenerationRequest,
    Shares,
    TokenLogprobs,
    Tokens,
    TokenShares,
)
from inference_gateway.service import Service
from inference_gateway.text import TextStream
from policy.keys import Principal

TOO_SLOW = Failed(
    "reader_too_slow",
    "the answer was written faster than it was read and has been given up; read faster or ask for less",
)
# After these, what has been written before may still be read. Any other failure, as a permission's end, takes it along.
KEEPS_WHAT_IS_WRITTEN = frozenset({"request_timeout", TOO_SLOW.code})


@dataclass(frozen=True)
class ShownToken:
    """A token of an answer, its part of the text, and what was asked for about it."""

    id: int
    text: str
    logprobs: TokenLogprobs | None = None
    shares: TokenShares | None = None


@dataclass(frozen=True)
class Piece:
    """Tokens of one choice whose text is certain now; the last piece says why the answer ends, or has failed.

    ``used`` counts all tokens so far, with those that are not shown.
    """

    index: int
    tokens: tuple[ShownToken, ...]
    used: int
    reason: str | None = None
    shares: Shares | None = None
    failed: Failed | None = None

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)


Opened = AbstractAsyncContextManager[Sequence[AsyncGenerator[Piece]]]


class Answers:
    """Writes ``count`` choices at once and keeps at most ``limit`` pieces for a reader; a slower one gets ``TOO_SLOW``.

    ``opened`` is entered first and left when all answers are over, in whatever way. The first choice that fails ends
    the others. ``lost`` is asked, in a thread, before a piece of a choice leaves that has ended already, for which
    nobody else watches the permission: the reason for which it must not.
    """

    def __init__(self, opened: Opened, count: int, limit: int | None, lost: Callable[[], Failed | None]):
        self.count = count
        self._limit = limit
        self._lost = lost
        self._ended: set[int] = set()
        self._pieces: deque[Piece] = deque()
        self._news = asyncio.Event()
        self._error: Exception | None = None
        self._over = False
        self._writing: list[asyncio.Task[None]] = []
        self._task = asyncio.create_task(self._run(opened))

    async def get(self, seconds: float | None = None) -> Piece | None:
        """The next piece; None when there is none left. Raises TimeoutError, or what an answer has raised."""
        while not self._pieces:
            if self._error is not None:
                raise self._error
            if self._over:
                return None
            self._news.clear()
            async with asyncio.timeout(seconds):
                await self._news.wait()
        piece = self._pieces[0]
        if piece.index in self._ended and piece.failed is None:
            lost = await run_in_threadpool(self._lost)
            if lost is not None:
                self._fail(Piece(piece.index, (), piece.used), lost)
        return self._pieces.popleft()

    async def aclose(self) -> None:
        """End what is still being written."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self, opened: Opened) -> None:
        try:
            async with opened as answers:
                self._writing = [asyncio.create_task(self._write(*one)) for one in enumerate(answers)]
                try:
                    await asyncio.gather(*self._writing, return_exceptions=True)
                finally:
                    self._end_others()
                    await asyncio.gather(*self._writing, return_exceptions=True)
        except Exception as error:  # noqa: BLE001 - raised where the answers are read
            self._error = self._error or error
        finally:
            self._over = True
            self._news.set()

    async def _write(self, index: int, answer: AsyncGenerator[Piece]) -> None:
        try:
            async with aclosing(answer):
                async for piece in answer:
                    if piece.failed is not None:
                        self._fail(piece, piece.failed)
                        return
                    if self._limit is not None and len(self._pieces) >= self._limit:
                        self._fail(piece, TOO_SLOW)
                        return
                    if piece.reason is not None:
                        self._ended.add(index)
                    self._pieces.append(piece)
                    self._news.set()
                    # The reader's turn: while there are events an engine's queue never waits, and nobody else ran.
                    await asyncio.sleep(0)
        except Exception as error:  # noqa: BLE001 - raised where the answers are read
            self._error = self._error or error
            self._news.set()
            self._end_others()
        finally:
            self._ended.add(index)

    def _fail(self, piece: Piece, failed: Failed) -> None:
        """Let ``failed`` be the last piece, in place of ``piece``."""
        if failed.code not in KEEPS_WHAT_IS_WRITTEN:
            self._pieces.clear()
        self._pieces.append(Piece(piece.index, (), piece.used, failed=failed))
        self._news.set()
        self._end_others()

    def _end_others(self) -> None:
        for task in self._writing:
            if task is not asyncio.current_task():
                task.cancel()


def begin(service: Service, caller: Principal, asked: Asked, stops: Sequence[str], limit: int | None) -> Answers:
    """Begin all choices, ``limit`` as in ``Answers``. The caller closes what this returns."""

    def lost() -> Failed | None:
        return service.permissions.lost(caller, asked.decision, frozenset(asked.silos))

    return Answers(_opened(service, caller, asked, stops), len(asked.requests), limit, lost)


@asynccontextmanager
async def _opened(
    service: Service, caller: Principal, asked: Asked, stops: Sequence[str]
) -> AsyncGenerator[Sequence[AsyncGenerator[Piece]]]:
    with await admitted(service, caller, asked.requests, asked.prompt_tokens) as ticket:
        yield [answer(service, caller, asked, *one, stops, ticket) for one in enumerate(asked.requests)]


async def answer(
    service: Service,
    caller: Principal,
    asked: Asked,
    index: int,
    request: GenerationRequest,
    stops: Sequence[str],
    ticket: Ticket,
) -> AsyncGenerator[Piece]:
    """The pieces of one choice; the last has a reason or has failed. Closing it ends the request in the engine."""
    text = TextStream(asked.serving.tokenizer, stops)
    ends = {*asked.serving.eos, *request.sampling.stop_ids}
    waiting: deque[ShownToken] = deque()
    used = 0

    def shown(pieces: Sequence[str]) -> tuple[ShownToken, ...]:
        tokens = [(waiting.popleft(), piece) for piece in pieces]
        return tuple(ShownToken(token.id, piece, token.logprobs, token.shares) for token, piece in tokens)

    with service.permissions.watching(request.request_id, caller, asked.decision, frozenset(asked.silos)):
        async with aclosing(ticket.generate(asked.serving.engine, request)) as events:
            async for event in events:
                if isinstance(event, Tokens):
                    used += len(event.ids)
                    fresh = [token for token in _tokens(event) if token.id not in ends]
                    waiting.extend(fresh)
                    tokens = shown(text.push([token.id for token in fresh]))
                    if text.stopped:
                        ticket.complete(request.request_id)
                        yield Piece(index, tokens, used, "stop", event.totals)
                        return
                    if tokens:
                        yield Piece(index, tokens, used)
                elif isinstance(event, Finished):
                    tokens = shown(text.finish())
                    yield Piece(index, tokens, used, "stop" if text.stopped else event.reason, event.shares)
                else:
                    yield Piece(index, (), used, failed=event)


def _tokens(event: Tokens) -> list[ShownToken]:
    count = len(event.ids)
    logprobs = event.logprobs or (None,) * count
    shares = event.shares or (None,) * count
    return [ShownToken(*one) for one in zip(event.ids, ("",) * count, logprobs, shares, strict=True)]
