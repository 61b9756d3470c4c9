"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}}."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from inference_gateway import request_record
from inference_gateway.engine.base import Failed
from inference_gateway.errors import EngineStopped, NotReady, Refused
from inference_gateway.oidc.errors import IssuerUnreachable, LoginError
from policy.errors import NotAllowed, NotAuthenticated, PolicyError, Unavailable
from seqr.errors import SeqrError

TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
# A request that ended while it ran: the status when nothing has been sent yet.
FAILED_STATUS = {
    "access_ended": 401,
    "permission_revoked": 403,
    "policy_unavailable": 503,
    "adapter_replaced": 503,
    "grammar_too_complex": 400,
    "reader_too_slow": 408,
    "request_timeout": 504,
}


class ApiError(SeqrError):
    """A refused request, with its HTTP status and the parameter that is to blame."""

    status = 400

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class UnsupportedParameter(ApiError):
    """A parameter of OpenAI's interface that this gateway does not have; refused rather than ignored."""

    code = "unsupported_parameter"


class UnknownParameter(ApiError):
    """A parameter that nobody has."""

    code = "unknown_parameter"


class InvalidValue(ApiError):
    """A parameter of the wrong type or out of its range."""

    code = "invalid_value"


class InvalidJson(ApiError):
    """A body that is no JSON."""

    code = "invalid_json"


class MessagesInvalid(ApiError):
    """Messages that the model's chat template cannot render."""

    code = "messages_invalid"


class ContextLengthExceeded(ApiError):
    """A prompt, or a prompt and its answer, longer than the model's context."""

    code = "context_length_exceeded"


class ModelNotFound(ApiError):
    """A model or silo that does not exist or that the caller may not use; the two cannot be told apart."""

    code = "model_not_found"
    status = 404


class SiloUnavailable(ApiError):
    """A silo that the caller may use has no adapter in the library at the moment."""

    code = "silo_unavailable"
    status = 503


class KeyMissing(ApiError):
    """A request without an API key."""

    code = "key_missing"
    status = 401


class CrossSiteRequest(ApiError):
    """A request with the cookie of a log-in that does not prove to come from this gateway's own page."""

    code = "cross_site_request"
    status = 403


class BodyTooLarge(ApiError):
    """A request body beyond the limit."""

    code = "body_too_large"
    status = 413


class BodyTooSlow(ApiError):
    """A request body that did not arrive in time."""

    code = "body_too_slow"
    status = 408


def error_body(message: str, code: str, status: int, param: str | None = None) -> dict[str, Any]:
    """The body of an error with this HTTP status; the request's record keeps its code."""
    request_record.current().error_code = code
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def status_of(error: SeqrError | PolicyError) -> int:
    """The HTTP status of an error."""
    if isinstance(error, ApiError | Refused):
        return error.status
    unavailable = (Unavailable, NotReady, EngineStopped, IssuerUnreachable)
    families = (((NotAuthenticated, LoginError), 401), (NotAllowed, 403), (unavailable, 503))
    return next((status for family, status in families if isinstance(error, family)), 500)


def body_of_error(error: SeqrError | PolicyError) -> dict[str, Any]:
    """The body of an error, the same before a stream begins and as an event in it."""
    param = error.param if isinstance(error, ApiError) else None
    body = error_body(str(error), error.code, status_of(error), param)
    if isinstance(error, Refused):
        body["error"]["type"] = error.kind
    return body


def server_fault() -> dict[str, Any]:
    """The body of an unexpected error: the server logs the cause, the caller learns nothing about it."""
    return error_body("the request could not be served because of an internal error", "internal_error", 500)


def failed_status(failed: Failed) -> int:
    """The HTTP status for a request that failed before anything was sent."""
    return FAILED_STATUS.get(failed.code, 500)


def respond(
    message: str, code: str, status: int, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """An error response; 401 says how to authenticate and 503 when to try again."""
    extra = dict(headers or {})
    if status == 401:
        extra["WWW-Authenticate"] = "Bearer"
    if status == 503:
        extra["Retry-After"] = "1"
    return JSONResponse(error_body(message, code, status, param), status, headers=extra)


def install(app: FastAPI) -> None:
    """Give every error of ``app`` OpenAI's shape."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(PolicyError, _other_error)
    app.add_exception_handler(SeqrError, _other_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)


async def _api_error(_request: Request, error: Any) -> JSONResponse:
    # What is left of a body that was not read to its end must not be taken for the next request.
    headers = {"Connection": "close"} if isinstance(error, BodyTooLarge | BodyTooSlow) else None
    return respond(str(error), error.code, error.status, error.param, headers)


async def _refused(_request: Request, error: Any) -> JSONResponse:
    # OpenAI's clients try again by themselves unless they are told that it cannot help.
    again = {"x-should-retry": "false"} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    return JSONResponse(body_of_error(error), error.status, headers=again)


async def _other_error(_request: Request, error: Any) -> JSONResponse:
    return respond(str(error), error.code, status_of(error))


async def _validation_error(_request: Request, error: Any) -> JSONResponse:
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"] if part != "body") or None
    if first["type"] == "extra_forbidden":
        return respond(f"unknown parameter: {param}", UnknownParameter.code, 400, param)
    if first["type"] == "missing":
        return respond(f"the parameter {param or 'body'} is missing", "missing_parameter", 400, param)
    return respond(f"{param or 'the body'}: {first['msg']}", InvalidValue.code, 400, param)


async def _http_error(_request: Request, error: Any) -> JSONResponse:
    return respond(f"{error.detail}", f"http_{error.status_code}", error.status_code, headers=error.headers)


def unexpected() -> JSONResponse:
    """The answer to a request that met a defect. The log has the cause; the caller learns nothing about it."""
    return JSONResponse(server_fault(), 500)
