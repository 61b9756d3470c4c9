"""Coordinators to test with, on SQLite, and where a test asks for it on a real PostgreSQL too."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from coordinator.db import upgrade
from coordinator.models import metadata
from policy.db import upgrade as upgrade_policy
from tests.coordinator.world import World
from tests.policy.conftest import PostgresServer


@dataclass(frozen=True)
class Databases:
    """URLs of the coordinator's and of policy's database, with their schemas and nothing in them."""

    coordinator: str
    policy: str


class PostgresPool:
    """Databases on one server, lent to a test and emptied afterwards."""

    def __init__(self) -> None:
        self._server = PostgresServer()
        self._free: list[str] = []

    def lend(self) -> tuple[str, str]:
        if not self._free:
            name = f"coordinator_{len(self._free)}"
            self._server.create(template="template0", name=name)
            upgrade(self._server.url(name))
            self._free.append(name)
        return self._free.pop(), self._server.lend()

    def urls(self, names: tuple[str, str]) -> Databases:
        return Databases(*(self._server.url(name) for name in names))

    def give_back(self, names: tuple[str, str]) -> None:
        with self._server.connect(names[0]) as connection:
            connection.execute(f"TRUNCATE {', '.join(metadata.tables)} RESTART IDENTITY")
        self._free.append(names[0])
        self._server.give_back(names[1])

    def stop(self) -> None:
        self._server.stop()


@pytest.fixture(scope="session")
def postgres_pool() -> Iterator[PostgresPool]:
    pool = PostgresPool()
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def empty_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("schemas")
    upgrade(f"sqlite:///{folder}/coordinator.db")
    upgrade_policy(f"sqlite:///{folder}/policy.db")
    return folder


@contextmanager
def postgres_databases(request: pytest.FixtureRequest) -> Iterator[Databases]:
    pool: PostgresPool = request.getfixturevalue("postgres_pool")
    names = pool.lend()
    yield pool.urls(names)
    pool.give_back(names)


def on_postgres(request: pytest.FixtureRequest) -> bool:
    return getattr(request, "param", "sqlite") == "postgresql"


@pytest.fixture
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    """A coordinator that nobody has joined, on SQLite unless the test says ``@on_both("world")``."""
    if on_postgres(request):
        with postgres_databases(request) as databases:
            made = World.make(tmp_path / "coordinator", databases.coordinator, databases.policy)
            yield made
            made.close()
        return
    folder = tmp_path / "databases"
    shutil.copytree(request.getfixturevalue("empty_sqlite"), folder)
    urls = (f"sqlite:///{folder}/coordinator.db", f"sqlite:///{folder}/policy.db")
    made = World.make(tmp_path / "coordinator", *urls)
    yield made
    made.close()


@pytest.fixture(scope="session")
def model_clinic(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.with_clinic(tmp_path_factory.mktemp("model") / "coordinator")


@pytest.fixture
def clinic(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    """A plan, a gateway, and the silo clinic with its first revision active; ``@on_both("clinic")`` for both."""
    if on_postgres(request):
        with postgres_databases(request) as databases:
            made = World.with_clinic(tmp_path / "coordinator", databases.coordinator, databases.policy)
            yield made
            made.close()
        return
    model: World = request.getfixturevalue("model_clinic")
    made = model.copy(tmp_path / "coordinator")
    yield made
    made.close()
