"""One tiny model and one plan for all tests of the gateway, and one running gateway for those that speak HTTP."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn

from inference_gateway.app import create_app
from inference_gateway.coordinator_client import CoordinatorClient
from inference_gateway.service import Service, Serving
from inference_gateway.settings import Settings
from policy.db import create_engine_for, upgrade
from policy.keys import create_pepper
from policy.store import PolicyStore
from seqr.keys import SealingKey, SigningKey
from seqr.models import build_tiny_model
from seqr.plan import Plan
from tests.inference_gateway.fake_coordinator import API_KEY, FakeCoordinator
from tests.inference_gateway.support import Gateway, make_plan, random_adapter

HOW: dict[str, Any] = {"actor": "test", "reason": "a test"}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def gateway() -> Gateway:
    return Gateway(SealingKey.generate(), SigningKey.generate())


@pytest.fixture(scope="session")
def plan(model_dir: Path, gateway: Gateway) -> Plan:
    return make_plan(model_dir, gateway)


@dataclass
class World:
    """A gateway's surroundings: a coordinator, a policy with its users' keys, and the settings that name them."""

    coordinator: FakeCoordinator
    policy: PolicyStore
    settings: Settings
    keys: dict[str, str]
    grants: dict[tuple[str, str], str]

    def grant(self, user: str, silo: str) -> None:
        self.grants[user, silo] = self.policy.add_grant(f"user:{user}", silo, **HOW).grant_id

    def revoke(self, user: str, silo: str) -> None:
        self.policy.revoke_grant(self.grants.pop((user, silo)), **HOW)


@pytest.fixture(scope="session")
def make_world(model_dir: Path, plan: Plan, gateway: Gateway) -> Callable[[Path], World]:
    def make(directory: Path) -> World:
        directory.mkdir(parents=True)
        url = f"sqlite:///{directory / 'policy.db'}"
        upgrade(url)
        store = PolicyStore(create_engine_for(url), create_pepper(directory / "policy.pepper"))
        for silo in ("alpha", "beta", "gamma", "nobody"):
            store.add_silo(silo, **HOW)
        keys = {}
        for user in ("alice", "bob", "carol"):
            store.create_user(user, **HOW)
            keys[user] = store.create_key(user, ["chat"], **HOW).secret
        gateway.signing.save(directory / "signing.key")
        gateway.sealing.save(directory / "sealing.key")
        (directory / "coordinator-api.key").write_text(API_KEY + "\n")
        coordinator = FakeCoordinator(plan)
        settings = Settings(
            directory=directory,
            coordinator_url="https://coordinator",
            coordinator_public_key=coordinator.key.public.to_b64(),
            policy_database_url=url,
            base_model=model_dir,
            port=0,
            poll_seconds=0.05,
            max_concurrent=8,
            max_batch_tokens=64,
            kv_tokens=4096,
            default_max_tokens=16,
            threads=1,
        )
        return World(coordinator, store, settings, keys, {})

    return make


class Stand(Service):
    """A gateway in which a test may serve requests with something ``instead``, once it is ready."""

    instead: Serving | None = None

    @property
    def serving(self) -> Serving:
        own = super().serving
        return self.instead or own


class Server(uvicorn.Server):
    """Says which loop it runs in."""

    loop: asyncio.AbstractEventLoop

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().serve(sockets)


class Running:
    """A gateway under uvicorn in a thread."""

    def __init__(self, world: World, **service: Any):
        self.world = world
        self._clients: dict[str, openai.OpenAI] = {}
        client = CoordinatorClient(
            "https://coordinator", API_KEY, transport=httpx.ASGITransport(app=world.coordinator.app)
        )
        self.service = Stand(world.settings, client, **service)
        self.app = create_app(self.service)
        port = world.settings.port
        config = uvicorn.Config(self.app, port=port, ws="none", log_config=None, timeout_graceful_shutdown=2)
        self.server = Server(config)
        self._thread = threading.Thread(target=self.server.run, daemon=True)

    def start(self) -> "Running":
        self._thread.start()
        wait_until(lambda: self.server.started)
        return self

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join(timeout=20)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of the server's thread."""
        return self.server.loop

    @property
    def url(self) -> str:
        port = self.server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    def http(self, user: str | None = None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.world.keys[user]}"} if user else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def openai(self, user: str) -> openai.OpenAI:
        if user not in self._clients:  # making one takes longer than asking a tiny model
            key = self.world.keys[user]
            self._clients[user] = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)
        return self._clients[user]

    def await_adapters(self, *silos: str) -> None:
        wait_until(lambda: self.service.problem() is None and sorted(self.service.serving.resident()) == sorted(silos))


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def running(
    make_world: Callable[[Path], World], plan: Plan, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """A gateway with adapters of alpha, beta and gamma; alice may use alpha and gamma, bob beta, carol nothing."""
    world = make_world(tmp_path_factory.mktemp("world") / "gateway")
    for seed, silo in enumerate(("alpha", "beta", "gamma")):
        world.coordinator.stage(silo, 1, random_adapter(plan, seed))
    for user, silo in (("alice", "alpha"), ("alice", "gamma"), ("alice", "nobody"), ("bob", "beta")):
        world.grant(user, silo)
    server = Running(world).start()
    try:
        server.await_adapters("alpha", "beta", "gamma")
        yield server
    finally:
        server.stop()
