"""Puts the API together."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from coordinator.api import deletion_requests, gateway, grants, health, jobs, people, plans, problems, revisions, silos
from coordinator.api.middleware import AccessLog, BodyLimit
from coordinator.api.state import Services
from coordinator.core import Coordinator
from coordinator.driver import Driver
from coordinator.loop import Loop
from coordinator.reconcile import Reconciler
from coordinator.silos import NodeRegistry


def create_app(coordinator: Coordinator, nodes: NodeRegistry, with_loop: bool = True) -> FastAPI:
    """The API over an opened coordinator; with ``with_loop`` it also carries deletions forward while it serves."""
    reconciler = Reconciler(coordinator, nodes)
    driver = Driver(coordinator, reconciler)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        if not with_loop:
            yield
            return
        with Loop(coordinator.settings, driver):
            yield

    # No interactive documentation: it would be the one part that answers without a key.
    app = FastAPI(title="seqr coordinator", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.services = Services(coordinator, driver, reconciler)
    problems.install(app)
    for part in (health, silos, plans, jobs, revisions, deletion_requests, gateway, people, grants):
        app.include_router(part.router)
    app.add_middleware(BodyLimit, limit=coordinator.settings.max_body_bytes)
    app.add_middleware(AccessLog)
    return app
