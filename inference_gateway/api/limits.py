"""Refuses bodies that are too large before they are read, and those that do not come to an end."""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inference_gateway.api.errors import BodyTooLarge, BodyTooSlow, respond


class BodyLimit:
    """ASGI middleware: 413 for a body beyond ``max_bytes``, announced or found out while reading; 408 for one that is
    not there ``max_seconds`` after the headers.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_seconds: float):
        self._app = app
        self._max_bytes = max_bytes
        self._max_seconds = max_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > self._max_bytes:
            await self._refuse(scope, receive, send)
            return
        size = 0
        deadline: float | None = asyncio.get_running_loop().time() + self._max_seconds

        async def counted() -> Message:
            nonlocal size, deadline
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise BodyTooSlow(f"the body did not arrive within {self._max_seconds:g} seconds") from None
            if not message.get("more_body", False):
                deadline = None  # what is received from here on is the end of the connection, whenever that is
            size += len(message.get("body", b""))
            if size > self._max_bytes:
                raise BodyTooLarge(self._sentence())
            return message

        await self._app(scope, counted, send)

    def _sentence(self) -> str:
        return f"the body is larger than the {self._max_bytes} bytes that are allowed"

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        await respond(self._sentence(), BodyTooLarge.code, BodyTooLarge.status)(scope, receive, send)
