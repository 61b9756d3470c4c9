"""Server-sent events: an answer piece by piece, comments while nothing happens, errors as events, [DONE] at the end."""

import json
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from inference_gateway import request_record
from inference_gateway.api.answering import Answers, Piece
from inference_gateway.api.errors import body_of_error, error_body, failed_status, server_fault
from inference_gateway.api.format import Format
from inference_gateway.engine.base import Failed
from policy.errors import PolicyError
from seqr.errors import SeqrError

log = logging.getLogger(__name__)

KEEP_ALIVE = b": keep-alive\n\n"


class EventStream(StreamingResponse):
    """A stream of events that ends its answers however it ends, even when it never began."""

    def __init__(self, answers: Answers, body: AsyncGenerator[bytes], headers: Mapping[str, str]):
        # Some proxies hold a stream back until they are told not to.
        extra = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(body, media_type="text/event-stream", headers={**headers, **extra})
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._answers.aclose()


async def events(
    answers: Answers, first: Piece | None, written: Format, *, include_usage: bool, keep_alive: float
) -> AsyncGenerator[bytes]:
    """The events of a stream. ``first`` is the piece that has been read already, if it came in time.

    ``keep_alive``: seconds of silence after which a comment is sent.
    """
    silent = {"usage": None} if include_usage else {}
    ends: list[Piece] = []
    try:
        for choice in written.opening():
            yield _event({**written.event(choice), **silent})
        piece = first
        while True:
            if piece is None:
                try:
                    piece = await answers.get(keep_alive)
                except TimeoutError:
                    yield KEEP_ALIVE
                    continue
            if piece is None:
                break
            if piece.failed is not None:
                yield _event(_failed(piece.failed))
                break
            if piece.reason is not None:
                ends.append(piece)
            bodies = [{**written.event(choice), **silent} for choice in written.parts(piece)]
            if len(ends) == answers.count:
                bodies[-1] |= written.closing(ends)
            for body in bodies:
                yield _event(body)
            piece = None
        if include_usage and len(ends) == answers.count:
            yield _event({**written.event(), "usage": written.usage(ends)})
    except (SeqrError, PolicyError) as error:
        yield _event(body_of_error(error))
    except Exception:
        log.exception("a stream ends with an error", extra={"fields": request_record.current().ids})
        yield _event(server_fault())
    yield b"data: [DONE]\n\n"


async def first_piece(answers: Answers, seconds: float, has_place: Callable[[], bool]) -> Piece | None:
    """The piece that decides between an HTTP error and a stream; None if an answer has a place by now, and ``seconds``
    have brought nothing. Who waits in the queue for too long gets a status, which clients know how to repeat.
    """
    while True:
        try:
            return await answers.get(seconds)
        except TimeoutError:
            if has_place():
                return None


def _failed(failed: Failed) -> Mapping[str, Any]:
    return error_body(failed.message, failed.code, failed_status(failed))


def _event(body: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
