"""Reads a request's JSON body, after the caller is known."""

import json
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from inference_gateway.api.errors import InvalidJson
from inference_gateway.api.schema import ChatRequest


async def chat_request(request: Request) -> ChatRequest:
    """Raises InvalidJson, BodyTooLarge, UnsupportedParameter, or RequestValidationError naming a wrong field."""
    document = parse(await request.body())
    try:
        return ChatRequest.model_validate(document)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False, include_context=False)) from None


def parse(data: bytes) -> Any:
    """Strict JSON in UTF-8: no NaN, no name twice in an object, no lone surrogates, no nesting beyond Python's stack.

    A filter before the gateway may read the first of two equal names where Python reads the last. Raises InvalidJson.
    """
    try:
        document = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_unique)
        json.dumps(document, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError):
        raise InvalidJson("the body is not valid JSON in UTF-8") from None
    return document


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a name is given twice")
    return members


ChatBody = Annotated[ChatRequest, Depends(chat_request)]
