"""Runs the gateway's application under uvicorn."""

import asyncio

import uvicorn

from inference_gateway.app import create_app
from inference_gateway.service import Service
from inference_gateway.settings import Settings
from seqr.logs import configure

SHUTDOWN_S = 5
# Longer than clients and proxies (nginx: 60 s) keep an idle connection, so that none is closed as it is used again.
KEEP_ALIVE_S = 75


def run(settings: Settings) -> None:
    """Serve until a signal; raises the error that kept the gateway from starting."""
    configure(settings.log_format)
    service = Service(settings)
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(service),
            host=settings.host,
            port=settings.port,
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
            ws="none",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=SHUTDOWN_S,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
    )
    asyncio.run(_serve(server, service))
    if service.failure is not None:
        raise service.failure


async def _serve(server: uvicorn.Server, service: Service) -> None:
    async def stop_when_failed() -> None:
        await service.failed.wait()
        server.should_exit = True

    watching = asyncio.create_task(stop_when_failed())
    try:
        await server.serve()
    finally:
        watching.cancel()
