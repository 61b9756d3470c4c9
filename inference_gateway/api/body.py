"""Reads a request's JSON body, after the caller is known."""

import json
import math
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from inference_gateway.api.auth import Caller, ServiceDep
from inference_gateway.api.errors import InvalidJson
from inference_gateway.service import Service
from policy.keys import Principal

# Far beyond any schema that people write; templates, schemas and validators recurse.
MAX_NESTING = 64
# Bytes that are read in a few milliseconds at worst.
SHORT = 16 * 1024

T = TypeVar("T")
Model = TypeVar("Model", bound=BaseModel)


def body_of(model: type[Model]) -> Callable[..., Awaitable[Model]]:
    """A dependency that reads a body of this kind.

    It raises Overloaded, InvalidJson, BodyTooLarge, UnsupportedParameter, InvalidValue, or RequestValidationError
    naming a field.
    """

    async def read(request: Request, service: ServiceDep, caller: Caller) -> Model:
        return await reading(request, service, caller, lambda document: validated(model, document))

    return read


async def reading(request: Request, service: Service, caller: Principal, check: Callable[[Any], T]) -> T:
    """The body after ``check``; one that takes long is read in the caller's turn, and others are served meanwhile.

    Raises Overloaded, before anything of it is read, where the caller has too many bodies under way already.
    """
    with service.turns.reading(caller.user_id, max(SHORT, _announced(request, service.settings.max_body_bytes))):
        data = await request.body()
        if len(data) <= SHORT:
            return check(parse(data))
        return await service.turns.run(caller.user_id, lambda: check(parse(data)))


def _announced(request: Request, most: int) -> int:
    """The size of the body in bytes as the headers tell it; ``most`` where they do not."""
    return most if "transfer-encoding" in request.headers else int(request.headers.get("content-length", 0))


def validated(model: type[Model], document: Any) -> Model:
    """``document`` as a ``model``. Raises what ``body_of`` says."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_context=False)
        places = [_place(document, one["loc"]) for one in wrong]
        # Of the members of a union the one that got furthest into the document knows best what is wrong.
        best = max(range(len(wrong)), key=lambda index: len(places[index]))
        raise RequestValidationError([{**wrong[best], "loc": places[best]}]) from None


def parse(data: bytes) -> Any:
    """Strict JSON in UTF-8: no NaN, no number beyond a double, no name given twice, no lone surrogate, no deep nesting.

    A filter before the gateway may read the first of two equal names where Python reads the last. Raises InvalidJson.
    """
    try:
        document = json.loads(
            data.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique
        )
        json.dumps(document, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError):
        raise InvalidJson("the body is not valid JSON in UTF-8") from None
    level = [document] if isinstance(document, dict | list) else []
    for _ in range(MAX_NESTING):
        children = (
            node.values() if isinstance(node, dict) else node for node in level if isinstance(node, dict | list)
        )
        level = [child for nodes in children for child in nodes if isinstance(child, dict | list)]
    if level:
        raise InvalidJson(f"the body is nested more than {MAX_NESTING} levels deep")
    return document


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(digits)
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a name is given twice")
    return members


def _place(document: Any, loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """The part of pydantic's ``loc`` that leads into the document, and a missing or unknown field after it."""
    place: list[int | str] = []
    for index, part in enumerate(loc):
        inside = (isinstance(document, dict) and part in document) or (
            isinstance(document, list) and isinstance(part, int) and part < len(document)
        )
        if inside:
            place.append(part)
            document = document[part]
        elif isinstance(document, dict) and index == len(loc) - 1:
            place.append(part)
    return tuple(place)
