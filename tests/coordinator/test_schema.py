"""Migrations make exactly the tables that the code works with, on both databases."""

from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import text

from coordinator.db import VERSION_TABLE, open_engine, require_schema, upgrade, writing
from coordinator.errors import DatabaseUnusable, SchemaOutdated, SettingsInvalid, StateDirExists, StateDirMissing
from coordinator.models import metadata
from coordinator.settings import load_settings, make_settings
from coordinator.setup import init_state, render_config
from tests.coordinator.world import World, on_both


@on_both("world")
def test_the_migrations_make_the_tables_of_the_models(world: World) -> None:
    with world.c.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
        assert compare_metadata(context, metadata) == []


def test_upgrading_twice_changes_nothing_and_another_schema_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/x.db"
    with pytest.raises(SchemaOutdated):
        require_schema(open_engine(url))
    upgrade(url)
    upgrade(url)
    engine = open_engine(url)
    require_schema(engine)
    with writing(engine) as connection:
        connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = 'future'"))
    with pytest.raises(SchemaOutdated):
        require_schema(engine)


@pytest.mark.parametrize("url", ["mysql://root@x/y", "sqlite://", "nonsense", "sqlite:////no/such/folder/x.db"])
def test_an_unusable_database_url_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(DatabaseUnusable) as caught:
        open_engine(url)
    assert "root@x" not in str(caught.value) and "/no/such" not in str(caught.value)


def test_settings_name_the_wrong_field_and_not_its_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsInvalid, match="port"):
        make_settings(directory=tmp_path, port=99999)
    with pytest.raises(SettingsInvalid, match="prot"):
        make_settings(directory=tmp_path, prot=1)
    with pytest.raises(SettingsInvalid, match="two databases"):
        make_settings(directory=tmp_path, database_url="sqlite:///x", policy_database_url="sqlite:///x")
    with pytest.raises(SettingsInvalid, match="belong together"):
        make_settings(directory=tmp_path, ssl_certfile=Path("x"))
    (tmp_path / "coordinator.toml").write_text("port = [")
    with pytest.raises(SettingsInvalid, match="not valid TOML"):
        load_settings(tmp_path)
    (tmp_path / "coordinator.toml").write_text('port = 1234\ndatabase_url = "postgresql://u:secret@h/x"')
    monkeypatch.setenv("SEQR_COORDINATOR_PORT", "4321")
    assert load_settings(tmp_path).port == 4321
    monkeypatch.setenv("SEQR_COORDINATOR_PORT", "x")
    with pytest.raises(SettingsInvalid) as caught:
        load_settings(tmp_path)
    assert "secret" not in str(caught.value)


def test_paths_are_relative_to_the_state_directory(tmp_path: Path) -> None:
    (tmp_path / "coordinator.toml").write_text('ssl_certfile = "certs/a.crt"\nssl_keyfile = "/abs/a.key"')
    settings = load_settings(tmp_path)
    assert settings.ssl_certfile == tmp_path / "certs" / "a.crt"
    assert settings.ssl_keyfile == Path("/abs/a.key")
    assert settings.database_url == f"sqlite:///{tmp_path}/coordinator.db"


def test_a_key_is_never_replaced_and_private_files_are_private(tmp_path: Path) -> None:
    settings = make_settings(directory=tmp_path / "c")
    init_state(settings, {"federation": "x"})
    with pytest.raises(StateDirExists):
        init_state(settings, {})
    for path in (settings.signing_key_file, settings.subject_salt_file):
        assert path.stat().st_mode & 0o777 == 0o600
    for folder in (settings.directory, settings.bundles, settings.keystore):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_an_interrupted_init_is_completed_by_the_next(tmp_path: Path) -> None:
    settings = make_settings(directory=tmp_path / "c")
    settings.directory.mkdir()
    settings.keystore.mkdir()
    settings.subject_salt_file.write_bytes(b"s" * 32)
    init_state(settings, {})
    assert settings.subject_salt_file.read_bytes() == b"s" * 32


def test_a_directory_without_a_coordinator_is_named(tmp_path: Path) -> None:
    from coordinator.core import open_coordinator

    with pytest.raises(StateDirMissing, match="coordinator init"):
        open_coordinator(make_settings(directory=tmp_path / "empty"))


def test_values_in_the_settings_file_cannot_break_out_of_it(tmp_path: Path) -> None:
    awkward = 'x" \nport = 1 \\'
    (tmp_path / "coordinator.toml").write_text(render_config({"policy_database_url": awkward}))
    assert load_settings(tmp_path).policy_database_url == awkward
