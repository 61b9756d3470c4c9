"""The schema: reachable, reversible, the same as the models, and whole under concurrency."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, text

from policy.db import create_engine_for, migrate, upgrade
from policy.errors import DatabaseUnreachable, DatabaseUrlInvalid, SchemaOutdated
from policy.models import Base
from policy.reader import PolicyReader
from policy.store import PolicyStore


def test_up_down_up(empty_url, how, downgrade):
    engine = create_engine_for(empty_url)
    migrate(engine, "head")
    PolicyStore(engine).create_user("alice", **how)
    downgrade(engine, "base")
    assert set(inspect(engine).get_table_names()) <= {"alembic_version"}
    migrate(engine, "head")
    assert PolicyStore(engine).create_user("alice", **how) == 1
    engine.dispose()


def test_models_say_what_the_newest_migration_makes(engine):
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_models_and_migrations_agree_on_every_constraint(engine, empty_url):
    """Alembic compares no check constraints; the database's own description does."""
    other = create_engine_for(empty_url)
    Base.metadata.create_all(other)
    migrated, made = inspect(engine), inspect(other)
    for table in Base.metadata.tables:
        for describe in (
            "check_constraints",
            "foreign_keys",
            "indexes",
            "unique_constraints",
            "pk_constraint",
            "columns",
        ):
            assert _described(migrated, describe, table) == _described(made, describe, table)
    other.dispose()


def _described(inspector, describe, table):
    found = getattr(inspector, f"get_{describe}")(table)
    if isinstance(found, dict):
        return repr(found)
    for index in found:  # the conditions of partial indexes are objects without a value of their own
        options = index.get("dialect_options", {})
        index["dialect_options"] = {name: str(value) for name, value in options.items()}
    return sorted(map(repr, found))


def test_ids_are_bytes_in_the_schema_of_postgresql(engine):
    if engine.dialect.name != "postgresql":
        pytest.skip("SQLite compares TEXT by bytes unless told otherwise")
    query = "SELECT table_name, column_name FROM information_schema.columns WHERE collation_name = 'C'"
    with engine.connect() as connection:
        found = {f"{table}.{column}" for table, column in connection.execute(text(query))}
    assert {"users.user_id", "groups.group_id", "silos.silo_id", "grants.user_id", "api_keys.prefix"} <= found


def test_two_services_that_start_together_both_find_the_schema(empty_url, how):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(upgrade, [empty_url] * 4))
    engine = create_engine_for(empty_url)
    assert PolicyStore(engine).create_user("alice", **how) == 1
    engine.dispose()


def test_a_database_without_schema_is_named(empty_url, how):
    engine = create_engine_for(empty_url)
    with pytest.raises(SchemaOutdated):
        PolicyStore(engine).create_user("alice", **how)
    with pytest.raises(SchemaOutdated):
        PolicyReader(engine).version()
    engine.dispose()


@pytest.mark.parametrize(
    "url", ["nonsense", "mysql://u:hunter2@h/d", "sqlite:///:memory:", "postgresql://h:x/d", "sqlite://"]
)
def test_an_unusable_url_is_refused_without_being_repeated(url):
    with pytest.raises(DatabaseUrlInvalid) as refused:
        create_engine_for(url)
    assert "hunter2" not in str(refused.value) and "nonsense" not in str(refused.value)


def test_an_unreachable_database_is_named_without_the_password(tmp_path):
    for url in (f"sqlite:///{tmp_path}/missing/p.db", f"postgresql://u:hunter2@/d?host={tmp_path}"):
        with pytest.raises(DatabaseUnreachable) as refused:
            upgrade(url)
        assert "hunter2" not in str(refused.value)


def test_a_new_sqlite_file_is_private(tmp_path):
    create_engine_for(f"sqlite:///{tmp_path}/p.db").dispose()
    assert (tmp_path / "p.db").stat().st_mode & 0o777 == 0o600
