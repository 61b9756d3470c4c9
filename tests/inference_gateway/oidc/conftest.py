"""An identity provider, and a gateway that takes its log-ins, with clocks that the tests move."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from inference_gateway.app import create_app
from inference_gateway.oidc.login import Oidc
from inference_gateway.oidc.settings import OidcSettings
from inference_gateway.service import Service
from policy.store import PolicyStore
from seqr.plan import Plan
from seqr.supervisor import free_port
from tests.inference_gateway.conftest import HOW, Running, World
from tests.inference_gateway.oidc.provider import CLIENT, Provider
from tests.inference_gateway.support import random_adapter


@dataclass
class Clock:
    """Seconds since nothing in particular."""

    now: float = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now

    def forward(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(scope="module")
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    made = Provider()
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def _fresh(provider: Provider, clock: Clock) -> None:
    provider.reset()
    clock.forward(3600 * 1000)  # whatever was kept or begun before is over


def oidc_settings(provider: Provider, public_url: str = "https://gateway.example", **more: Any) -> OidcSettings:
    return OidcSettings(issuer=provider.issuer, client_id=CLIENT, public_url=public_url, **more)


@pytest.fixture(scope="module")
def house(
    make_world: Callable[[Path], World],
    plan: Plan,
    provider: Provider,
    clock: Clock,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Running]:
    """A gateway under the provider. alice may use alpha, bob nothing; dora is disabled, a clerk may not chat."""
    world = make_world(tmp_path_factory.mktemp("oidc") / "gateway")
    port = free_port()
    chosen = oidc_settings(provider, f"http://127.0.0.1:{port}")
    world.settings = world.settings.model_copy(update={"port": port, "oidc": chosen})
    world.coordinator.stage("alpha", 1, random_adapter(plan, 0))
    world.grant("alice", "alpha")
    people(world.policy)
    server = Running(world, oidc=Oidc(chosen, world.settings.directory, clock, clock)).start()
    try:
        server.await_adapters("alpha")
        yield server
    finally:
        server.stop()


def people(policy: PolicyStore) -> None:
    policy.create_user("dora", **HOW)
    policy.disable_user("dora", **HOW)
    policy.create_user("clerk", ["auditor"], **HOW)


Opening = Callable[..., httpx.AsyncClient]


@pytest.fixture
def opening(make_world: Callable[[Path], World], provider: Provider, clock: Clock, tmp_path: Path) -> Opening:
    """Opens clients of gateways without a model, with [oidc] as given: whom they know gets 503 not_ready, not 401."""

    def opened(**oidc: Any) -> httpx.AsyncClient:
        world = make_world(tmp_path / "gateway")
        people(world.policy)
        chosen = oidc_settings(provider, **oidc)
        settings = world.settings.model_copy(update={"oidc": chosen})
        service = Service(settings, oidc=Oidc(chosen, settings.directory, clock, clock))
        transport = httpx.ASGITransport(app=create_app(service))
        return httpx.AsyncClient(transport=transport, base_url=chosen.public_url)

    return opened
