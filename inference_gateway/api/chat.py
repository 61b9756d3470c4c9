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
from inference_gateway.api.prompting import answer_grammar, chat_prompt, tool_format
from inference_gateway.api.responding import answered, head, usage
from inference_gateway.service import Serving
from inference_gateway.tools import CallReader, ToolCall, ToolFormat

router = APIRouter()

ChatBody = Annotated[ChatRequest, Depends(body_of(ChatRequest))]


@router.post("/chat/completions")
async def chat_completions(request: Request, service: ServiceDep, caller: Caller, chat: ChatBody) -> Response:
    """Answers shaped by the caller's permitted silos and by nothing else."""

    def want(serving: Serving) -> Wanted:
        return Wanted([chat_prompt(serving, chat)], "messages", answer_grammar(serving, chat))

    asked = await prepare(service, caller, chat, want)
    return await answered(request, service, caller, asked, chat, ChatFormat(asked, chat))


class ChatFormat:
    """How a chat's answers are written."""

    def __init__(self, asked: Asked, chat: ChatRequest):
        self._asked = asked
        self._chat = chat
        self._tools = tool_format(asked.serving, chat) if chat.may_call else None

    def whole(self, answers: Sequence[tuple[Sequence[ShownToken], Piece]]) -> Mapping[str, Any]:
        """See ``responding.Format``."""
        ends = [end for _, end in answers]
        return {
            **head(self._asked, "chat.completion", "chatcmpl"),
            "choices": [self._choice(tokens, end) for tokens, end in answers],
            "usage": usage(self._asked, ends),
            **attribution.summary(self._asked, (end.shares for end in ends)),
        }

    def _choice(self, tokens: Sequence[ShownToken], end: Piece) -> dict[str, Any]:
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
            **_about(self._asked, self._chat, tokens),
            "finish_reason": reason,
        }

    def parts(self) -> "ChatForm":
        """See ``responding.Format``."""
        return ChatForm(self._asked, self._chat, self._tools)


class ChatForm:
    """See ``streaming.Form``."""

    def __init__(self, asked: Asked, chat: ChatRequest, tools: ToolFormat | None):
        self.head = head(asked, "chat.completion.chunk", "chatcmpl")
        self._asked = asked
        self._chat = chat
        self._readers = [None if tools is None else tools.reader(chat.tool_names) for _ in asked.requests]

    def opening(self) -> Iterator[Mapping[str, Any]]:
        """The role, once for each choice."""
        for index in range(len(self._readers)):
            yield self._chunk(index, {"role": "assistant", "content": ""}, ())

    def choices(self, piece: Piece) -> Iterator[Mapping[str, Any]]:
        """New text with what was asked about its tokens; calls of tools, each whole; the end."""
        reader = self._readers[piece.index]
        text, calls = piece.text, []
        if reader is not None:
            before = len(reader.calls)
            text = reader.push(text) + (reader.finish() if piece.reason is not None else "")
            calls = list(enumerate(reader.calls))[before:]
        told = self._chat.logprobs or self._asked.request.attribution
        if text or (told and piece.tokens):
            yield self._chunk(piece.index, {"content": text}, piece.tokens)
        for number, call in calls:
            yield self._chunk(piece.index, {"tool_calls": [{"index": number, **_call(call)}]}, ())
        if piece.reason is not None:
            yield self._chunk(piece.index, {}, (), _reason(piece, reader))

    def closing(self, ends: Sequence[Piece]) -> Mapping[str, Any]:
        """Who shaped the answers, when asked for."""
        return attribution.summary(self._asked, (end.shares for end in ends))

    def usage(self, ends: Sequence[Piece]) -> Mapping[str, int]:
        """See ``responding.usage``."""
        return usage(self._asked, ends)

    def _chunk(
        self, index: int, delta: Mapping[str, Any], tokens: Sequence[ShownToken], reason: str | None = None
    ) -> Mapping[str, Any]:
        about = _about(self._asked, self._chat, tokens) if tokens else {"logprobs": None}
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
