"""Engines and schema. SQLite and PostgreSQL behave alike behind this file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DatabaseError, OperationalError

from policy.errors import (
    DatabaseDenied,
    DatabaseUnreachable,
    DatabaseUrlInvalid,
    PolicyBusy,
    PolicyError,
    SchemaOutdated,
)

MIGRATIONS: Final = Path(__file__).parent / "migrations"
BUSY_TIMEOUT_MS: Final = 30_000
# Any constant does; it keeps two processes from migrating one PostgreSQL database at once.
MIGRATION_LOCK: Final = 7_357_201


def parse_url(url: str) -> URL:
    """Raises DatabaseUrlInvalid unless this is a SQLite file or a PostgreSQL database (psycopg 3)."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise DatabaseUrlInvalid from None
    if parsed.drivername in {"postgres", "postgresql", "postgresql+psycopg"}:
        return parsed.set(drivername="postgresql+psycopg")
    # A memory database is a different one for every connection, and readers keep their own.
    if parsed.drivername in {"sqlite", "sqlite+pysqlite"} and parsed.database not in {None, "", ":memory:"}:
        return parsed.set(drivername="sqlite")
    raise DatabaseUrlInvalid


def create_engine_for(url: str, *, create: bool = True) -> Engine:
    """An engine with safe defaults: SQLite in WAL with full fsync and foreign keys, PostgreSQL READ COMMITTED.

    Writers on SQLite begin with BEGIN IMMEDIATE (see `writing`), so two of them queue instead of failing half-way.
    A SQLite file that is not there is made with mode 0600; with `create=False` it is DatabaseUnreachable instead.
    Raises DatabaseUrlInvalid.
    """
    parsed = parse_url(url)
    if parsed.get_backend_name() == "postgresql":
        return create_engine(parsed, pool_pre_ping=True, hide_parameters=True, connect_args=_waits(parsed))
    _check_file(Path(str(parsed.database)), create)
    engine = create_engine(parsed, hide_parameters=True, connect_args={"timeout": BUSY_TIMEOUT_MS / 1000})
    event.listen(engine, "connect", _configure_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


@contextmanager
def named_database_errors() -> Iterator[None]:
    """Turns the driver's errors that an operator can cause into ours; programming mistakes stay what they are."""
    try:
        yield
    except DatabaseError as error:
        named = _named(error)
        if named is None:
            raise
        raise named from error


def _named(error: DatabaseError) -> PolicyError | None:
    message, sqlstate = str(error.orig).lower(), getattr(error.orig, "sqlstate", None)
    if sqlstate == "42P01" or "no such table" in message:  # undefined_table
        return SchemaOutdated()
    if sqlstate == "42501" or "readonly database" in message:  # insufficient_privilege
        return DatabaseDenied()
    if sqlstate == "55P03" or "database is locked" in message or "database is busy" in message:  # lock_not_available
        return PolicyBusy()
    if isinstance(error, OperationalError) or "not a database" in message:
        return DatabaseUnreachable()
    return None


def writing(engine: Engine) -> Engine:
    """The same pool, its transactions taking SQLite's write lock at their beginning."""
    return engine.execution_options(sqlite_begin="BEGIN IMMEDIATE")


def _waits(parsed: URL) -> dict[str, Any]:
    """How long to wait for the server and for another writer, unless the URL says."""
    waits = {"connect_timeout": 10, "tcp_user_timeout": 15_000, "options": f"-c lock_timeout={BUSY_TIMEOUT_MS}"}
    return {name: value for name, value in waits.items() if name not in parsed.query}


def _check_file(path: Path, create: bool) -> None:
    if path.exists():
        return
    if not create or not path.parent.is_dir():
        raise DatabaseUnreachable
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))


def _configure_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # the driver begins nothing by itself; _begin_sqlite does
    cursor = connection.cursor()
    for pragma in (
        f"busy_timeout={BUSY_TIMEOUT_MS}",
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        "secure_delete=ON",
        # Without it, REPLACE deletes rows behind the back of the audit triggers.
        "recursive_triggers=ON",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    options = connection.get_execution_options()
    if options.get("isolation_level") != "AUTOCOMMIT":
        connection.exec_driver_sql(options.get("sqlite_begin", "BEGIN"))


def alembic_config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def migrate(engine: Engine, revision: str) -> None:
    """Moves the schema up to `revision` in one transaction: all of it or nothing, one process at a time."""
    with writing(engine).begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
        command.upgrade(alembic_config(connection), revision)


def upgrade(url: str) -> None:
    """Brings the database to the newest schema, creating it where there is none.

    Raises DatabaseUnreachable, DatabaseDenied, PolicyBusy.
    """
    engine = create_engine_for(url)
    try:
        with named_database_errors():
            migrate(engine, "head")
    finally:
        engine.dispose()


def require_schema(connection: Connection) -> None:
    """Raises SchemaOutdated unless the schema is the one this program was written for."""
    script = ScriptDirectory.from_config(alembic_config(connection))
    if MigrationContext.configure(connection).get_current_revision() != script.get_current_head():
        raise SchemaOutdated
