"""The one error renderer of the control plane: every refusal is RFC 9457 problem+json with a stable code."""

import logging
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DBAPIError
from starlette.exceptions import HTTPException

from coordinator.errors import CoordinatorError
from policy import errors as policy
from seqr.errors import SeqrError

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
# The first family an error belongs to gives its status.
_POLICY_STATUS: tuple[tuple[type[policy.PolicyError], int], ...] = (
    (policy.VersionMismatch, 412),
    (policy.InvalidInput, 422),
    (policy.NotFound, 404),
    (policy.Conflict, 409),
    (policy.NotAuthenticated, 401),
    (policy.NotAllowed, 403),
    (policy.Unavailable, 503),
)


def problem(status: int, code: str, detail: str) -> JSONResponse:
    """A problem document; 401 says how to authenticate, 503 when to come back."""
    body = {
        "type": f"urn:seqr:error:{code}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "code": code,
    }
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "2"}}.get(status, {})
    return JSONResponse(body, status, {**headers, "Cache-Control": "no-store"}, MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Have ``app`` answer every error with a problem document."""

    @app.exception_handler(SeqrError)
    async def seqr_error(_request: Request, error: SeqrError) -> JSONResponse:
        status = error.status if isinstance(error, CoordinatorError) else 422
        if status >= 500:
            logger.error("%s", error.code)
        return problem(status, error.code, str(error))

    @app.exception_handler(policy.PolicyError)
    async def policy_error(_request: Request, error: policy.PolicyError) -> JSONResponse:
        status = next((status for family, status in _POLICY_STATUS if isinstance(error, family)), 500)
        return problem(status, error.code, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        # The values are not repeated: they may hold a subject or a key.
        wrong = [f"{'.'.join(str(part) for part in one['loc'])}: {one['msg']}" for one in error.errors()]
        return problem(422, "body_invalid", "; ".join(wrong[:5]))

    @app.exception_handler(HTTPException)
    async def http_error(_request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 400:
            return problem(422, "body_invalid", "the request body cannot be read as JSON")
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        detail = f"{HTTPStatus(error.status_code).phrase}: this path or method is not part of the API"
        response = problem(error.status_code, code, detail)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(DBAPIError)
    async def database_error(_request: Request, error: DBAPIError) -> JSONResponse:
        logger.error("database error: %s", type(error.orig).__name__)
        return problem(503, "database_unusable", "the database does not answer; try again")

    @app.exception_handler(Exception)
    async def unexpected(_request: Request, _error: Exception) -> JSONResponse:
        # The server logs the traceback itself; the caller learns nothing of the inside.
        return problem(500, "internal_error", "something went wrong on the server; its log knows more")
