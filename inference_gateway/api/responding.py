"""From an admitted body to its response, plain or as a stream. The one place where answers leave the gateway."""

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from inference_gateway import request_record
from inference_gateway.api.answering import Answers, Piece, ShownToken, begin
from inference_gateway.api.errors import failed_status, respond
from inference_gateway.api.format import Format
from inference_gateway.api.models import headers_of
from inference_gateway.api.schema import GenerationBody
from inference_gateway.api.streaming import EventStream, events, first_piece
from inference_gateway.service import Service
from policy.keys import Principal

T = TypeVar("T")


async def answered(
    request: Request, service: Service, caller: Principal, body: GenerationBody, written: Format
) -> Response:
    """Generate all choices of what ``written`` is for, and write them."""
    asked = written.asked
    request_record.current().trace.asked(asked, bool(body.stream))
    headers = headers_of(asked.serving, asked.decision, asked.request.adapters)
    # Without a stream the gateway is the reader, and what it keeps is bounded by the answers' lengths.
    limit = service.settings.stream_buffer_events * len(asked.requests) if body.stream else None
    answers = begin(service, caller, asked, body.stops, limit)
    if body.stream:
        return await _stream(service, answers, body, written, headers, request)
    return await _plain(answers, written, headers, request)


async def _plain(answers: Answers, written: Format, headers: Mapping[str, str], request: Request) -> Response:
    try:
        collected = await _while_there(request, _collect(answers))
    except _ClientLeft:
        return Response(status_code=499)  # nobody is there to read it
    finally:
        await answers.aclose()
    if isinstance(collected, Piece):
        return _refused(collected, headers)
    return JSONResponse(written.whole(collected), headers=dict(headers))


async def _collect(answers: Answers) -> Piece | list[tuple[list[ShownToken], Piece]]:
    """All tokens and the last piece of each choice, or the piece with which one has failed."""
    tokens: list[list[ShownToken]] = [[] for _ in range(answers.count)]
    ends: dict[int, Piece] = {}
    while (piece := await answers.get()) is not None:
        if piece.failed is not None:
            return piece
        tokens[piece.index] += piece.tokens
        if piece.reason is not None:
            ends[piece.index] = piece
    return [(tokens[index], ends[index]) for index in range(answers.count)]


class _ClientLeft(Exception):
    """Whoever asked is no longer there."""


async def _while_there(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What ``work`` gives; it is cancelled when the client goes first. Raises _ClientLeft then."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise _ClientLeft
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(
    service: Service,
    answers: Answers,
    body: GenerationBody,
    written: Format,
    headers: Mapping[str, str],
    request: Request,
) -> Response:
    keep_alive, record = service.settings.keep_alive_seconds, request_record.current()
    try:
        # Afterwards only an event can tell of a failure.
        first = await _while_there(request, first_piece(answers, keep_alive, lambda: record.has_place))
    except _ClientLeft:
        await answers.aclose()
        return Response(status_code=499)
    except BaseException:
        await answers.aclose()
        raise
    if first is not None and first.failed is not None:
        await answers.aclose()
        return _refused(first, headers)
    usage = body.stream_options is not None and body.stream_options.include_usage
    return EventStream(answers, events(answers, first, written, include_usage=usage, keep_alive=keep_alive), headers)


def _refused(piece: Piece, headers: Mapping[str, str]) -> Response:
    failed = piece.failed
    if failed is None:
        raise ValueError("this piece has not failed")
    return respond(failed.message, failed.code, failed_status(failed), headers=headers)
