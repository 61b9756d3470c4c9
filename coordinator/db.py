"""The coordinator's database: its engine, its migrations, and transactions that a second process may share."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from coordinator.errors import DatabaseUnusable, SchemaOutdated
from policy import db as policy_db
from policy.errors import PolicyError

MIGRATIONS = Path(__file__).parent / "migrations"
# Not Alembic's default name: policy's tables may live in the same PostgreSQL database.
VERSION_TABLE = "coordinator_version"
MIGRATION_LOCK = 7_357_202

# A row of a table, by column name.
Row = Mapping[Any, Any]


def now() -> datetime:
    """The present, aware and in UTC."""
    return datetime.now(UTC)


def open_engine(url: str) -> Engine:
    """An engine with policy's settings: WAL, full fsync, foreign keys, and no deleted byte left in a free page.

    Raises DatabaseUnusable.
    """
    try:
        return policy_db.create_engine_for(url)
    except PolicyError:
        raise DatabaseUnusable(
            "the coordinator's database URL is not usable; write sqlite:///FILE in an existing folder or "
            "postgresql://USER@HOST/NAME"
        ) from None


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A transaction that only reads."""
    with engine.begin() as connection:
        yield connection


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """A transaction that writes; on SQLite it holds the write lock from its beginning."""
    with policy_db.writing(engine).begin() as connection:
        yield connection


def forget_deleted_bytes(engine: Engine) -> bool:
    """Empty SQLite's write-ahead log, which may still hold text that has since been deleted.

    Returns False when a reader was in the way and the call has to be repeated.
    """
    if engine.dialect.name != "sqlite":
        return True
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        busy = connection.execute(text("PRAGMA wal_checkpoint(TRUNCATE)")).scalar_one()
    return bool(busy == 0)


def upgrade(url: str) -> None:
    """Bring the schema to the newest migration, all or nothing. Raises DatabaseUnusable."""
    engine = open_engine(url)
    try:
        with writing(engine) as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
            command.upgrade(_alembic(connection), "head")
    except DBAPIError as error:
        raise DatabaseUnusable("the coordinator's database does not answer; check that it runs") from error
    finally:
        engine.dispose()


def require_schema(engine: Engine) -> None:
    """Raises SchemaOutdated unless the schema is the one this program was written for, DatabaseUnusable without one."""
    try:
        with reading(engine) as connection:
            head = ScriptDirectory.from_config(_alembic(connection)).get_current_head()
            context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
            current = context.get_current_revision()
    except DBAPIError as error:
        raise DatabaseUnusable("the coordinator's database does not answer; check that it runs") from error
    if current != head:
        raise SchemaOutdated("the coordinator's database has another schema; run `seqr coordinator init` to upgrade it")


def _alembic(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
