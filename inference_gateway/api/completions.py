"""POST /v1/completions: text that goes on from a prompt, without a chat's template."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from inference_gateway.api import attribution, logprobs
from inference_gateway.api.answering import Piece, ShownToken
from inference_gateway.api.asking import Asked, Wanted, prepare
from inference_gateway.api.auth import Caller, ServiceDep
from inference_gateway.api.body import body_of
from inference_gateway.api.format import Format
from inference_gateway.api.prompting import text_prompt
from inference_gateway.api.responding import answered
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
    return await answered(request, service, caller, body, CompletionFormat(asked, body))


class CompletionFormat(Format):
    """How completions are written. A stream remembers how long each choice's text is so far."""

    def __init__(self, asked: Asked, body: CompletionRequest):
        super().__init__(asked, ("text_completion", "text_completion"), "cmpl")
        self._body = body
        self._lengths = [0] * len(asked.requests)

    def choice(self, tokens: Sequence[ShownToken], end: Piece) -> Mapping[str, Any]:
        """The text, and what was asked about its tokens."""
        return self._part(end.index, tokens, 0, end.reason)

    def opening(self) -> Iterator[Mapping[str, Any]]:
        """Nothing: a completion has no role."""
        return iter(())

    def parts(self, piece: Piece) -> Iterator[Mapping[str, Any]]:
        """New text, and with the last of it the reason."""
        yield self._part(piece.index, piece.tokens, self._lengths[piece.index], piece.reason)
        self._lengths[piece.index] += len(piece.text)

    def _part(self, index: int, tokens: Sequence[ShownToken], offset: int, reason: str | None) -> Mapping[str, Any]:
        """A choice, or a part of it that begins at the character ``offset`` of its text."""
        told = None
        if self._body.logprobs is not None:
            told = logprobs.of_completion(self.asked.serving.grammars, tokens, offset)
        return {
            "index": index,
            "text": "".join(token.text for token in tokens),
            "logprobs": told,
            **attribution.of_tokens(self.asked, tokens),
            "finish_reason": reason,
        }
