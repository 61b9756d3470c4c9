"""PolicyReader: long-lived, always current, never in anybody's way."""

import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import text

from policy.errors import DatabaseUnreachable
from policy.reader import PolicyReader
from policy.store import PolicyStore

GRANT = """
import sys
from policy.db import create_engine_for
from policy.store import PolicyStore
store = PolicyStore(create_engine_for(sys.argv[1]))
print(store.add_grant("user:alice", "bank", actor="other process", reason="test").policy_version)
"""


@pytest.fixture
def reader(engine, pepper):
    with PolicyReader(engine, pepper) as reader:
        yield reader


def test_a_reader_sees_what_another_process_wrote(small, reader, url, clock):
    version = reader.version()
    assert reader.permitted("alice", clock()).silos == ()
    subprocess.run([sys.executable, "-c", GRANT, url], check=True, capture_output=True)
    assert reader.version() == version + 1
    assert PolicyReader(small.engine).version() == version + 1


def test_a_revocation_is_seen_by_the_next_read(small, reader, how, clock):
    grant = small.add_grant("user:alice", "bank", **how).grant_id
    for _ in range(20):
        assert reader.permitted("alice", clock()).silos == ("bank",)
        small.revoke_grant(grant, **how)
        assert reader.permitted("alice", clock()).silos == ()
        grant = small.add_grant("user:alice", "bank", **how).grant_id


def test_a_reader_holds_no_transaction_open(small, reader, engine, how, clock):
    """On SQLite an open one would keep the log from being folded in, on PostgreSQL it would hold back vacuum."""
    reader.version(), reader.permitted("alice", clock())
    small.create_user("carol", **how)
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            connection = connection.execution_options(isolation_level="AUTOCOMMIT")
            assert connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()[0] == 0, "nothing was in the way"
        else:
            states = text("SELECT state FROM pg_stat_activity WHERE datname = current_database()")
            assert not [state for state in connection.execute(states).scalars() if "idle in" in (state or "")]


def test_readers_do_not_wait_for_an_open_write(small, reader, clock, how):
    def slow(change):
        started = time.perf_counter()
        seen = reader.version(), reader.permitted("alice", clock()).silos
        assert time.perf_counter() - started < 2
        return seen

    version = small.version()
    assert small.write(lambda tx: (tx.record("test"), slow(tx))[1], **how) == (version, ())
    assert reader.version() == version + 1


def test_threads_share_a_reader(small, reader, how, clock):
    small.add_grant("user:alice", "bank", **how)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: (reader.version(), reader.permitted("alice", clock()).silos), range(400)))
    assert set(answers) == {(small.version(), ("bank",))}


def test_a_lost_connection_is_opened_anew(small, reader, engine):
    if engine.dialect.name != "postgresql":
        pytest.skip("SQLite has no server to lose")
    version = reader.version()
    engine.dispose()
    kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = "
    with engine.connect() as connection:
        connection.execute(text(kill + "current_database()"))
    assert reader.version() == version


def test_a_database_that_is_gone_is_an_error_never_an_answer(small, reader, engine, url, request, clock):
    reader.version()
    if engine.dialect.name == "postgresql":
        name = url.split("/@/")[-1].split("@/")[-1].split("?")[0]
        engine.dispose()
        with request.getfixturevalue("postgres").connect() as admin:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    else:
        reader.close()
        engine.dispose()
        path = Path(url.removeprefix("sqlite:///"))
        shutil.move(path, path.with_suffix(".away"))
        path.mkdir()
    for _ in range(2):
        with pytest.raises(DatabaseUnreachable):
            reader.permitted("alice", clock())


def test_a_store_and_a_reader_work_from_one_engine(small, reader, how):
    assert PolicyStore(small.engine).create_user("dora", **how) == reader.version()
