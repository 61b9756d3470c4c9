"""Refuses bodies that are too large before they are read."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inference_gateway.api.errors import BodyTooLarge, respond


class BodyLimit:
    """ASGI middleware: 413 for a body beyond ``max_bytes``, announced or found out while reading."""

    def __init__(self, app: ASGIApp, max_bytes: int):
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > self._max_bytes:
            await self._refuse(scope, receive, send)
            return
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_bytes:
                raise BodyTooLarge(self._sentence())
            return message

        await self._app(scope, counted, send)

    def _sentence(self) -> str:
        return f"the body is larger than the {self._max_bytes} bytes that are allowed"

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        await respond(self._sentence(), BodyTooLarge.code, BodyTooLarge.status)(scope, receive, send)
