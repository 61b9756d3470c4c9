"""The gateway as an ASGI application."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import APIRouter, Depends, FastAPI

from inference_gateway.api import chat, completions, errors, health, login, metrics, models, openapi, tokenize
from inference_gateway.api.auth import authenticated
from inference_gateway.api.limits import BodyLimit
from inference_gateway.api.observing import Observing
from inference_gateway.playground import create_router as playground_router
from inference_gateway.service import Service


def create_app(service: Service) -> FastAPI:
    """Routes under /v1, /tokenize and /detokenize need an API key or a log-in, /metrics a key of scope metrics.

    /healthz, /readyz and what belongs to the page's log-in need none.
    """

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await service.stop()

    app = FastAPI(
        title="seqr gateway",
        lifespan=lifespan,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # it would send callers, and their keys, to whatever host the request names
    )
    app.state.service = service
    v1 = APIRouter(prefix="/v1", dependencies=[Depends(authenticated)])
    v1.include_router(chat.router)
    v1.include_router(completions.router)
    v1.include_router(models.router)
    v1.include_router(openapi.router)
    app.include_router(v1)
    app.include_router(tokenize.router, dependencies=[Depends(authenticated)])
    app.include_router(health.router)
    if service.settings.playground:  # a page for everybody, with nothing of this gateway in it
        app.include_router(playground_router())
        app.include_router(login.create_router(service.oidc))
    app.include_router(metrics.router)
    errors.install(app)
    limits = service.settings
    app.add_middleware(BodyLimit, max_bytes=limits.max_body_bytes, max_seconds=limits.max_body_seconds)
    app.add_middleware(Observing, metrics=service.metrics, tracing=service.tracing)
    return app
