"""/v1/openapi.json: what this gateway's interface is, for callers with a key. It says nothing about silos or users."""

from collections.abc import Iterator
from importlib.metadata import version
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.params import Depends
from fastapi.routing import RouteContext, iter_route_contexts
from pydantic import BaseModel, TypeAdapter

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
        headers = [one for one in operation.get("parameters", ()) if one["name"] == "authorization"]
        if headers:
            operation["security"] = [{"key": []}]
            operation["parameters"] = [one for one in operation["parameters"] if one not in headers]
        body = _body(route)
        if body is not None:
            told = TypeAdapter(body).json_schema(ref_template=_REFERENCE)
            schemas |= told.pop("$defs", {})
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": told}}}
    return document


def _operations(app: FastAPI, document: dict[str, Any]) -> Iterator[tuple[RouteContext, dict[str, Any]]]:
    for route in iter_route_contexts(app.routes):
        told = document["paths"].get(route.path_format, {})
        for method in route.methods or ():
            if method.lower() in told:
                yield route, told[method.lower()]


def _body(route: RouteContext) -> Any:
    """What a dependency reads the body into: the one parameter of the route's function that is a model, or several."""
    hints = get_type_hints(route.endpoint, include_extras=True) if route.endpoint else {}
    for hint in hints.values():
        if get_origin(hint) is Annotated and any(isinstance(extra, Depends) for extra in get_args(hint)[1:]):
            kind = get_args(hint)[0]
            if all(isinstance(one, type) and issubclass(one, BaseModel) for one in get_args(kind) or (kind,)):
                return kind
    return None
