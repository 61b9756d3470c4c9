"""Around every request: an id, a limit on the body, and one log line that holds no body, no query and no key."""

import logging
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send

from coordinator.api.problems import problem

logger = logging.getLogger("coordinator.access")

Message = MutableMapping[str, Any]

# Asked every half second for as long as a federation lives: only their refusals are news.
POLLED = frozenset({"/healthz", "/readyz", "/v1/gateway/revisions"})


class BodyLimit:
    """Answers 413 as soon as a body is, or turns out to be, longer than ``limit`` bytes."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if not declared.isdigit() or int(declared) > self._limit:
            await self._refuse(scope, receive, send)
            return
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._limit:
                await self._refuse(scope, receive, send)
                return
        await self._app(scope, _replay(bytes(body), receive), send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        detail = f"the request body may have at most {self._limit} bytes"
        await problem(413, "body_too_large", detail)(scope, receive, send)


class AccessLog:
    """Gives each request an id, returns it as X-Request-Id, and logs how it went."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id, started, status = uuid.uuid4().hex, time.monotonic(), 500

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            # The template, not the path: what a caller writes into a URL is not for the log.
            route = getattr(scope.get("route"), "path", "-")
            fields = {
                "request_id": request_id,
                "method": scope["method"],
                "route": route,
                "status": status,
                "ms": round(1000 * (time.monotonic() - started), 1),
                "user": scope.get("state", {}).get("user_id", "-"),
            }
            asked_all_the_time = route in POLLED and status < HTTPStatus.BAD_REQUEST
            level = logging.DEBUG if asked_all_the_time else logging.INFO
            logger.log(level, "request", extra={"fields": fields})


def _replay(body: bytes, receive: Receive) -> Callable[[], Awaitable[Message]]:
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
