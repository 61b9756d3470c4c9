"""POST /v1/completions: text that goes on from a prompt, without a chat's template."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from inference_gateway.api import attribution, logprobs
from inference_gateway.api.answering import Piece, ShownToken
from inference_gateway.api.asking import Asked, Wanted, prepare
from inference_gateway.api.auth import Caller, ServiceDep
from inference_gateway.api.body import body_of
from inference_gateway.api.prompting import text_prompt
from inference_gateway.api.responding import answered, head, usage
from inference_gateway.api.text_schema import CompletionRequest
from inference_gateway.service import Serving

router = APIRouter()

CompletionBody = Annotated[CompletionRequest, Depends(body_of(CompletionRequest))]


@router.post("/completions")
async def completions(request: Request, service: ServiceDep, caller: Caller, body: CompletionBody) -> Response:
    """Texts shaped by the caller's permitted silos and by nothing else: ``n`` for each prompt, prompt by prompt."""

    def want(serving: Serving) -> Wanted:
        return Wanted([text_prompt(serving, prompt) for prompt in body.prompts], "prompt")

    asked = await prepare(service, caller, body, want)
    return await answered(request, service, caller, asked, body, CompletionFormat(asked, body))


class CompletionFormat:
    """How completions are written, whole and in parts."""

    def __init__(self, asked: Asked, body: CompletionRequest):
        self._asked = asked
        self._body = body

    def whole(self, answers: Sequence[tuple[Sequence[ShownToken], Piece]]) -> Mapping[str, Any]:
        """See ``responding.Format``."""
        ends = [end for _, end in answers]
        return {
            **head(self._asked, "text_completion", "cmpl"),
            "choices": [self.choice(end.index, tokens, 0, end.reason) for tokens, end in answers],
            "usage": usage(self._asked, ends),
            **attribution.summary(self._asked, (end.shares for end in ends)),
        }

    def choice(self, index: int, tokens: Sequence[ShownToken], offset: int, reason: str | None) -> dict[str, Any]:
        """One choice, or a part of it that begins at the character ``offset`` of its text."""
        told = None
        if self._body.logprobs is not None:
            told = logprobs.of_completion(self._asked.serving.grammars, tokens, offset)
        return {
            "index": index,
            "text": "".join(token.text for token in tokens),
            "logprobs": told,
            **attribution.of_tokens(self._asked, tokens),
            "finish_reason": reason,
        }

    def parts(self) -> "CompletionForm":
        """See ``responding.Format``."""
        return CompletionForm(self._asked, self)


class CompletionForm:
    """See ``streaming.Form``."""

    def __init__(self, asked: Asked, written: CompletionFormat):
        self.head = head(asked, "text_completion", "cmpl")
        self._asked = asked
        self._written = written
        self._lengths = [0] * len(asked.requests)

    def opening(self) -> Iterator[Mapping[str, Any]]:
        """Nothing: a completion has no role."""
        return iter(())

    def choices(self, piece: Piece) -> Iterator[Mapping[str, Any]]:
        """New text, and with the last of it the reason."""
        yield self._written.choice(piece.index, piece.tokens, self._lengths[piece.index], piece.reason)
        self._lengths[piece.index] += len(piece.text)

    def closing(self, ends: Sequence[Piece]) -> Mapping[str, Any]:
        """Who shaped the answers, when asked for."""
        return attribution.summary(self._asked, (end.shares for end in ends))

    def usage(self, ends: Sequence[Piece]) -> Mapping[str, int]:
        """See ``responding.usage``."""
        return usage(self._asked, ends)
