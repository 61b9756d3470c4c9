"""POST /v1/chat/completions, plain and as server-sent events."""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from inference_gateway.api.admitted import admitted
from inference_gateway.api.asking import Asked, prepare
from inference_gateway.api.auth import Caller, ServiceDep
from inference_gateway.api.body import ChatBody
from inference_gateway.api.errors import error_body, failed_status, respond
from inference_gateway.api.schema import ChatRequest
from inference_gateway.engine.base import Failed, Finished, Shares, Tokens
from inference_gateway.service import Service
from inference_gateway.text import TextStream
from policy.keys import Principal

log = logging.getLogger(__name__)
router = APIRouter()


@dataclass
class Piece:
    """Text that is certain now and, in the last piece, why the answer ends."""

    text: str
    tokens: int
    reason: str | None = None
    shares: Shares | None = None
    failed: Failed | None = None


@router.post("/chat/completions")
async def chat_completions(
    request: Request,
    service: ServiceDep,
    caller: Caller,
    chat: ChatBody,
) -> Response:
    """An answer shaped by the caller's permitted silos and by nothing else."""
    asked = await prepare(service, caller.user_id, chat)
    headers = {
        "X-Seqr-Policy-Version": str(asked.decision.policy_version),
        "X-Seqr-Library-Version": asked.library_version,
    }
    pieces = answer(service, caller, asked, chat.stops)
    if chat.stream:
        return await _stream(asked, chat, pieces, headers)
    return await _plain(asked, pieces, headers, request)


async def answer(service: Service, caller: Principal, asked: Asked, stops: tuple[str, ...]) -> AsyncGenerator[Piece]:
    """The pieces of one answer; the last has a reason or has failed. Closing it ends the request in the engine."""
    text = TextStream(asked.serving.tokenizer, stops)
    used = 0
    silos = frozenset(asked.silos)
    grant = await admitted(service, caller, (asked.request,), len(asked.request.prompt), "messages")
    with grant, service.permissions.watching(asked.request.request_id, asked.decision, silos):
        async with aclosing(grant.generate(asked.serving.engine, asked.request)) as events:
            async for event in events:
                if isinstance(event, Tokens):
                    used += len(event.ids)
                    fresh = text.push(event.ids)
                    if text.stopped:
                        grant.complete(asked.request.request_id)
                        yield Piece(fresh, used, "stop")
                        return
                    if fresh:
                        yield Piece(fresh, used)
                elif isinstance(event, Finished):
                    rest = text.finish()
                    yield Piece(rest, used, "stop" if text.stopped else event.reason, event.shares)
                else:
                    yield Piece("", used, failed=event)


async def _plain(asked: Asked, pieces: AsyncGenerator[Piece], headers: Mapping[str, str], request: Request) -> Response:
    collecting = asyncio.create_task(_collect(pieces))
    leaving = asyncio.create_task(_left(request))
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            return Response(status_code=499)  # nobody is there to read it
        text, last = collecting.result()
    finally:
        collecting.cancel()
        leaving.cancel()
        await asyncio.gather(collecting, leaving, return_exceptions=True)
    if last.failed is not None:
        return respond(last.failed.message, last.failed.code, failed_status(last.failed), headers=headers)
    body = {
        "id": _completion_id(),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": asked.model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "logprobs": None,
                "finish_reason": last.reason,
            }
        ],
        "usage": _usage(asked, last.tokens),
    }
    return JSONResponse(body | _attribution(asked, last), headers=dict(headers))


async def _collect(pieces: AsyncGenerator[Piece]) -> tuple[str, Piece]:
    parts, last = [], Piece("", 0, "stop")
    async with aclosing(pieces) as open_pieces:
        async for last in open_pieces:
            parts.append(last.text)
    return "".join(parts), last


async def _left(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(
    asked: Asked, chat: ChatRequest, pieces: AsyncGenerator[Piece], headers: Mapping[str, str]
) -> Response:
    # The first piece decides between an HTTP error and a stream: afterwards only an event can tell of a failure.
    try:
        first = await anext(pieces)
    except BaseException:
        await pieces.aclose()
        raise
    if first.failed is not None:
        await pieces.aclose()
        return respond(first.failed.message, first.failed.code, failed_status(first.failed), headers=headers)
    usage = chat.stream_options is not None and chat.stream_options.include_usage
    body = _chunks(asked, first, pieces, usage)
    return StreamingResponse(body, media_type="text/event-stream", headers={**headers, "Cache-Control": "no-store"})


async def _chunks(
    asked: Asked, first: Piece, pieces: AsyncGenerator[Piece], include_usage: bool
) -> AsyncGenerator[bytes]:
    head = {
        "id": _completion_id(),
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": asked.model,
    }

    def chunk(delta: dict[str, str], reason: str | None = None, extra: Mapping[str, Any] | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        silent = {"usage": None} if include_usage else {}
        return _event({**head, "choices": [choice], **silent, **(extra or {})})

    async with aclosing(pieces):
        yield chunk({"role": "assistant", "content": ""})
        piece: Piece | None = first
        while piece is not None:
            if piece.text:
                yield chunk({"content": piece.text})
            if piece.failed is not None:
                failed = piece.failed
                yield _event(error_body(failed.message, failed.code, failed_status(failed)))
            elif piece.reason is not None:
                yield chunk({}, piece.reason, _attribution(asked, piece))
                if include_usage:
                    yield _event({**head, "choices": [], "usage": _usage(asked, piece.tokens)})
            piece = await anext(pieces, None)
        yield b"data: [DONE]\n\n"


def _event(body: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def _completion_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"


def _usage(asked: Asked, tokens: int) -> dict[str, int]:
    prompt = len(asked.request.prompt)
    return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}


def _attribution(asked: Asked, last: Piece) -> dict[str, Any]:
    """Which silo shaped the answer, when asked for: shares of all (token, module) choices, and of the answer's."""
    if not asked.request.attribution:
        return {}
    shares = last.shares
    return {
        "seqr": {
            "permitted": list(asked.silos),
            "routing": asked.request.mode,
            "policy_version": asked.decision.policy_version,
            "library_version": asked.library_version,
            "shares": _shares(shares.total, shares.choices) if shares else None,
            "answer_shares": _shares(shares.answer, shares.answer_choices) if shares else None,
        }
    }


def _shares(counts: Mapping[str, int], choices: int) -> dict[str, float]:
    return {silo: round(count / choices, 6) for silo, count in sorted(counts.items())} if choices else {}
