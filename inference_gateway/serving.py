"""Runs the gateway's application under uvicorn."""

import asyncio
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from inference_gateway.app import create_app
from inference_gateway.service import Service
from inference_gateway.settings import Settings
from seqr.logs import configure

SHUTDOWN_S = 5
# Longer than clients and proxies (nginx: 60 s) keep an idle connection, so that none is closed as it is used again.
KEEP_ALIVE_S = 75
# From the opening of a connection, or the first byte of a further request, to the end of the request's headers.
HEADERS_S = 10


class HeadersInTime(asyncio.Protocol):
    """Before one of uvicorn's HTTP protocols: closes connections whose next request's headers do not come to an end.

    uvicorn itself waits for them for ever. Of it this uses ``cycle``, the request whose headers were complete last.
    """

    cycle: Any
    _closing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._closing = asyncio.get_running_loop().call_later(HEADERS_S, transport.close)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_closing()
        elif self._closing is None:
            self._closing = asyncio.get_running_loop().call_later(HEADERS_S, self._transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_closing()
        super().connection_lost(exc)

    def _stop_closing(self) -> None:
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None


class Protocol(HeadersInTime, AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's choice, which is httptools where it is installed, else h11."""


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
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=Protocol,
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
