"""Runs the gateway's application under uvicorn."""

import asyncio
import socket
import struct
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from inference_gateway.api.errors import respond
from inference_gateway.app import create_app
from inference_gateway.service import Service
from inference_gateway.settings import Settings
from seqr.logs import configure

SHUTDOWN_S = 5
# Longer than clients and proxies (nginx: 60 s) keep an idle connection, so that none is closed as it is used again.
KEEP_ALIVE_S = 75
# From the opening of a connection, or the first byte of a further request, to the end of the request's headers.
HEADERS_S = 10
# Of `struct tcp_info` in linux/tcp.h: segments sent and not acknowledged; bytes acknowledged; bytes not sent yet.
TCP_INFO = struct.Struct("=24xI92xQ16xI")
TCP_INFO_OPTION: int | None = getattr(socket, "TCP_INFO", None)


class Bounded(asyncio.Protocol):
    """Before one of uvicorn's HTTP protocols: refuses connections beyond ``max_connections``, and closes those whose
    next request's headers do not come to an end, and those that have something to read and take none of it for
    ``send_timeout`` seconds (at most twice as long, and on Linux only).

    uvicorn itself takes as many as come and waits for headers and readers for ever. Of it this uses ``connections``,
    all that are open, and ``cycle``, the request whose headers were complete last.
    """

    max_connections: int
    send_timeout: float
    connections: set[Any]
    cycle: Any
    _refused = False
    _closing: asyncio.TimerHandle | None = None
    _watching: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if len(self.connections) >= self.max_connections:
            self._refused = True
            cast(asyncio.Transport, transport).write(_too_many_connections())
            transport.close()
            return
        super().connection_made(transport)
        self._closing = asyncio.get_running_loop().call_later(HEADERS_S, transport.close)
        self._transport = cast(asyncio.Transport, transport)
        self._watch(None)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_closing()
        elif self._closing is None:
            self._closing = asyncio.get_running_loop().call_later(HEADERS_S, self._transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_closing()
        if self._watching is not None:
            self._watching.cancel()
        if not self._refused:
            super().connection_lost(exc)

    def _watch(self, before: int | None) -> None:
        """Ends the connection if ``before``, which is what ``taken`` was the last time, is still all."""
        now = taken(self._transport.get_extra_info("socket"))
        if now is not None and now == before:
            self._transport.abort()
        else:
            self._watching = asyncio.get_running_loop().call_later(self.send_timeout, self._watch, now)

    def _stop_closing(self) -> None:
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None


class Protocol(Bounded, AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's choice, which is httptools where it is installed, else h11."""


def taken(connection: socket.socket) -> int | None:
    """How many bytes the peer has taken so far; None if no more wait for it, or where the system does not tell.

    Asked of the system, as over TLS no transport knows, and without TLS only a third of the system's buffer at a time.
    """
    if TCP_INFO_OPTION is None:
        return None
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, TCP_INFO_OPTION, TCP_INFO.size)
        in_flight, acknowledged, unsent = TCP_INFO.unpack(info)
    except (OSError, struct.error):  # closed at this very moment; an older system's shorter answer
        return None
    return acknowledged if in_flight or unsent else None


def _too_many_connections() -> bytes:
    response = respond("this gateway has as many connections as it takes; try again later", "overloaded", 503)
    head = b"".join(b"%s: %s\r\n" % header for header in response.raw_headers)
    return b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\n%s\r\n%s" % (head, response.body)


def run(settings: Settings) -> None:
    """Serve until a signal; raises the error that kept the gateway from starting."""
    configure(settings.log_format)
    service = Service(settings)
    server = uvicorn.Server(config_of(create_app(service), settings))
    asyncio.run(_serve(server, service))
    if service.failure is not None:
        raise service.failure


def config_of(app: ASGIApp, settings: Settings) -> uvicorn.Config:
    """How ``app`` is served."""
    bounds = {"max_connections": settings.max_connections, "send_timeout": settings.send_timeout_seconds}
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=type("Protocol", (Protocol,), bounds),
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
        ws="none",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=SHUTDOWN_S,
        timeout_keep_alive=KEEP_ALIVE_S,
    )


async def _serve(server: uvicorn.Server, service: Service) -> None:
    async def stop_when_failed() -> None:
        await service.failed.wait()
        server.should_exit = True

    watching = asyncio.create_task(stop_when_failed())
    try:
        await server.serve()
    finally:
        watching.cancel()
