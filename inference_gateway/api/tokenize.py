"""POST /tokenize and /detokenize, in vLLM's form: what the model makes of a prompt."""

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from inference_gateway.api.auth import Caller, ServiceDep
from inference_gateway.api.body import body_of, reading, validated
from inference_gateway.api.models import check_model
from inference_gateway.api.prompting import chat_prompt, check_tokens
from inference_gateway.api.text_schema import DetokenizeRequest, TokenizeMessages, TokenizePrompt
from inference_gateway.service import Serving

router = APIRouter()


async def _tokenize_body(request: Request, service: ServiceDep, caller: Caller) -> TokenizePrompt | TokenizeMessages:
    return await reading(request, service, caller, _validated)


def _validated(document: Any) -> TokenizePrompt | TokenizeMessages:
    chat = isinstance(document, dict) and "messages" in document
    return validated(TokenizeMessages, document) if chat else validated(TokenizePrompt, document)


TokenizeBody = Annotated[TokenizePrompt | TokenizeMessages, Depends(_tokenize_body)]
DetokenizeBody = Annotated[DetokenizeRequest, Depends(body_of(DetokenizeRequest))]


@router.post("/tokenize")
async def tokenize(service: ServiceDep, caller: Caller, body: TokenizeBody) -> dict[str, Any]:
    """The tokens of a prompt, or of messages under the model's chat template."""
    serving = service.serving
    await check_model(service, caller, body.model)
    return await service.turns.run(caller.user_id, _tokens, serving, body)


@router.post("/detokenize")
async def detokenize(service: ServiceDep, caller: Caller, body: DetokenizeBody) -> dict[str, Any]:
    """The text of tokens."""
    serving = service.serving
    await check_model(service, caller, body.model)
    return await service.turns.run(caller.user_id, _text, serving, body)


def _tokens(serving: Serving, body: TokenizePrompt | TokenizeMessages) -> dict[str, Any]:
    ids = list(_ids(serving, body))
    return {
        "count": len(ids),
        "max_model_len": serving.engine.info().max_model_length,
        "tokens": ids,
        "token_strs": serving.tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None,
    }


def _text(serving: Serving, body: DetokenizeRequest) -> dict[str, Any]:
    check_tokens(serving, body.tokens, "tokens")
    return {"prompt": serving.tokenizer.decode(body.tokens)}


def _ids(serving: Serving, body: TokenizePrompt | TokenizeMessages) -> Sequence[int]:
    if isinstance(body, TokenizeMessages):
        return chat_prompt(serving, body, body.add_generation_prompt, body.add_special_tokens)
    ids: list[int] = serving.tokenizer(body.prompt, add_special_tokens=body.add_special_tokens)["input_ids"]
    return ids
