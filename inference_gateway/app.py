"""The gateway as an ASGI application."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import APIRouter, Depends, FastAPI

from inference_gateway.api import chat, errors, health, models, openapi
from inference_gateway.api.auth import authenticated
from inference_gateway.api.limits import BodyLimit
from inference_gateway.service import Service


def create_app(service: Service) -> FastAPI:
    """Routes under /v1 need an API key; /healthz and /readyz need none."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await service.stop()

    app = FastAPI(title="seqr gateway", lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.state.service = service
    v1 = APIRouter(prefix="/v1", dependencies=[Depends(authenticated)])
    v1.include_router(chat.router)
    v1.include_router(models.router)
    v1.include_router(openapi.router)
    app.include_router(v1)
    app.include_router(health.router)
    errors.install(app)
    limits = service.settings
    app.add_middleware(BodyLimit, max_bytes=limits.max_body_bytes, max_seconds=limits.max_body_seconds)
    return app
