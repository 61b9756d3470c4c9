"""Around every HTTP request: an id, headers that were decided on the way, one log line and one count."""

import logging
import re
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inference_gateway import request_record
from inference_gateway.api.errors import unexpected
from inference_gateway.metrics import Metrics
from inference_gateway.request_record import RequestRecord
from inference_gateway.tracing import Tracing

log = logging.getLogger("inference_gateway.access")

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# Asked every few seconds for as long as a gateway lives: only their refusals are news.
POLLED = frozenset({"/healthz", "/readyz", "/metrics"})


class Observing:
    """ASGI middleware. Answers with the caller's X-Request-Id when it is well formed, else with one made here.

    An exception that nobody foresaw ends here, as 500 and in the log. The log line holds the route's template, never
    the path, query or body, and the policy's ids of user and key.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing):
        self._app = app
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record, started, status = RequestRecord(), time.perf_counter(), 0
        given = Headers(scope=scope).get("x-request-id", "")
        if REQUEST_ID.fullmatch(given):
            record.request_id = given
        if scope["path"] not in POLLED:
            record.trace = self._tracing.request(scope)
        request_record.begin(record)

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in record.headers.items():
                    headers[name] = value
                headers["X-Request-Id"] = record.request_id
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except ClientDisconnect:
            if not status:  # it left while its body was being read
                await Response(status_code=499)(scope, receive, noting)
        except Exception:
            if status:  # part of the answer is out: the server must cut the connection
                record.error_code = "internal_error"
                raise
            log.exception("a request could not be served", extra={"fields": record.ids})
            await unexpected()(scope, receive, noting)
        finally:
            route = _template(scope)
            method = scope["method"] if scope["method"] in METHODS else "other"
            self._metrics.responded(route, method, status)
            record.trace.end(method, route, status, record)
            line = {
                **record.ids,
                "method": method,
                "route": route,
                "status": status,
                "ms": round(1000 * (time.perf_counter() - started), 1),
                **record.fields,
            }
            level = logging.DEBUG if route in POLLED and status < 400 else logging.INFO
            log.log(level, "request", extra={"fields": line})


def _template(scope: Scope) -> str:
    """The matched route's path with its parameters' names, ``-`` where none matched."""
    # A route in an included router knows its path without the prefix; FastAPI keeps the whole one beside it.
    whole = scope.get("fastapi", {}).get("effective_route_context")
    path: str = getattr(whole or scope.get("route"), "path", "-")
    return path
