"""POST /v1/chat/completions: a conversation's next turn, plain and as server-sent events."""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from inference_gateway.api import attribution, logprobs
from inference_gateway.api.answering import Piece, ShownToken
from inference_gateway.api.asking import Asked, Wanted, prepare
from inference_gateway.api.auth import Caller, ServiceDep
from inference_gateway.api.body import body_of
from inference_gateway.api.chat_schema import ChatRequest
from inference_gateway.api.format import Format
from inference_gateway.api.prompting import answer_grammar, chat_prompt, tool_format
from inference_gateway.api.responding import answered
from inference_gateway.service import Serving
from inference_gateway.tools import CallReader, ToolCall

router = APIRouter()

ChatBody = Annotated[ChatRequest, Depends(body_of(ChatRequest))]


@router.post("/chat/completions")
async def chat_completions(request: Request, service: ServiceDep, caller: Caller, chat: ChatBody) -> Response:
    """Answers shaped by the caller's permitted silos and by nothing else."""

    def want(serving: Serving) -> Wanted:
        return Wanted([chat_prompt(serving, chat)], "messages", answer_grammar(serving, chat))

    asked = await prepare(service, caller, chat, want)
    return await answered(request, service, caller, chat, ChatFormat(asked, chat))


class ChatFormat(Format):
    """How a chat's answers are written. Every choice of a stream has a reader of tool calls of its own."""

    def __init__(self, asked: Asked, chat: ChatRequest):
        super().__init__(asked, ("chat.completion", "chat.completion.chunk"), "chatcmpl")
        self._chat = chat
        self._tools = tool_format(asked.serving, chat) if chat.may_call else None
        self._readers = [None if self._tools is None else self._tools.reader(chat.tool_names) for _ in asked.requests]

    def choice(self, tokens: Sequence[ShownToken], end: Piece) -> Mapping[str, Any]:
        """The message, and what was asked about its tokens."""
        message: dict[str, Any] = {"role": "assistant", "content": "".join(token.text for token in tokens)}
        reason = end.reason
        if self._tools is not None:
            reader = self._tools.reader(self._chat.tool_names)
            text = reader.push(message["content"]) + reader.finish()
            if reader.calls:
                message |= {"content": text.strip() or None, "tool_calls": [_call(one) for one in reader.calls]}
                reason = _reason(end, reader)
        return {
            "index": end.index,
            "message": message,
            **_about(self.asked, self._chat, tokens),
            "finish_reason": reason,
        }

    def opening(self) -> Iterator[Mapping[str, Any]]:
        """The role, once for each choice."""
        for index in range(len(self._readers)):
            yield self._chunk(index, {"role": "assistant", "content": ""}, ())

    def parts(self, piece: Piece) -> Iterator[Mapping[str, Any]]:
        """New text with what was asked about its tokens; calls of tools, each whole; the end."""
        reader = self._readers[piece.index]
        text, calls = piece.text, []
        if reader is not None:
            before = len(reader.calls)
            text = reader.push(text) + (reader.finish() if piece.reason is not None else "")
            calls = list(enumerate(reader.calls))[before:]
        told = self._chat.logprobs or self.asked.request.attribution
        if text or (told and piece.tokens):
            yield self._chunk(piece.index, {"content": text}, piece.tokens)
        for number, call in calls:
            yield self._chunk(piece.index, {"tool_calls": [{"index": number, **_call(call)}]}, ())
        if piece.reason is not None:
            yield self._chunk(piece.index, {}, (), _reason(piece, reader))

    def _chunk(
        self, index: int, delta: Mapping[str, Any], tokens: Sequence[ShownToken], reason: str | None = None
    ) -> Mapping[str, Any]:
        about = _about(self.asked, self._chat, tokens) if tokens else {"logprobs": None}
        return {"index": index, "delta": delta, **about, "finish_reason": reason}


def _about(asked: Asked, chat: ChatRequest, tokens: Sequence[ShownToken]) -> dict[str, Any]:
    told = logprobs.of_chat(asked.serving.grammars, tokens) if chat.logprobs else None
    return {"logprobs": told, **attribution.of_tokens(asked, tokens)}


def _call(call: ToolCall) -> dict[str, Any]:
    return {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _reason(end: Piece, reader: CallReader | None) -> str | None:
    """Why a choice ends; one that was cut off after a call has not called all it wanted."""
    called = reader is not None and reader.calls
    return "tool_calls" if called and end.reason == "stop" else end.reason
