"""/v1/openapi.json: what this gateway's interface is, for callers with a key. It says nothing about silos or users."""

import inspect
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from typing import Any, get_type_hints

from fastapi import APIRouter, FastAPI, Request
from fastapi.dependencies.models import Dependant
from fastapi.openapi.utils import get_openapi
from fastapi.routing import RouteContext, iter_route_contexts
from pydantic import BaseModel

from inference_gateway.api.auth import authenticated

router = APIRouter()

_REFERENCE = "#/components/schemas/{model}"
_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}


@router.get("/openapi.json")
async def openapi_json(request: Request) -> dict[str, Any]:
    """The OpenAPI 3.1 document of all routes."""
    return schema(request.app)


def schema(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI 3.1 document of ``app``: bodies are those that its dependencies read, errors have OpenAI's shape."""
    document = get_openapi(title=app.title, version=version("seqr"), routes=app.routes)
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's own; errors here have another shape
        schemas.pop(unused, None)
    schemas["Error"] = _ERROR
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for route, operation in _operations(app, document):
        operation["responses"].pop("422", None)
        operation["responses"]["default"] = {
            "description": "An error",
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        }
        if needs_key(route):
            operation["security"] = [{"key": []}]
            operation["parameters"] = [p for p in operation["parameters"] if p["name"] != "authorization"]
        body = _body(route)
        if body is not None:
            told = body.model_json_schema(ref_template=_REFERENCE)
            schemas |= told.pop("$defs", {})
            schemas[body.__name__] = told
            reference = {"$ref": _REFERENCE.format(model=body.__name__)}
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": reference}}}
    return document


def needs_key(route: RouteContext) -> bool:
    """Whether a request to this route is served only to the owner of a key."""
    return authenticated in set(calls(route))


def calls(route: RouteContext) -> Iterator[Any]:
    """Everything that runs before the route's own function, nested dependencies included."""
    dependant: Dependant | None = getattr(route, "dependant", None)
    waiting = list(dependant.dependencies) if dependant is not None else []
    while waiting:
        one = waiting.pop()
        waiting.extend(one.dependencies)
        yield one.call


def _operations(app: FastAPI, document: dict[str, Any]) -> Iterator[tuple[RouteContext, dict[str, Any]]]:
    for route in iter_route_contexts(app.routes):
        told = document["paths"].get(route.path_format, {})
        for method in route.methods or ():
            if method.lower() in told:
                yield route, told[method.lower()]


def _body(route: RouteContext) -> type[BaseModel] | None:
    """The model that one of the route's dependencies reads the body into."""
    return next((model for model in map(_returned_model, calls(route)) if model is not None), None)


@cache
def _returned_model(call: Any) -> type[BaseModel] | None:
    returned = get_type_hints(call).get("return") if inspect.isroutine(call) else None
    return returned if isinstance(returned, type) and issubclass(returned, BaseModel) else None
