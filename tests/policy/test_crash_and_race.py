"""Many writers at once, and writers that die: the version and the chain stay whole."""

import multiprocessing
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import event

from policy import audit, decision, listing
from policy.db import create_engine_for
from policy.errors import PolicyError, VersionMismatch
from policy.store import PolicyStore
from policy.times import utc_now

WRITERS = 50

# Forked, not started anew: a fresh interpreter would spend its time on imports.
PROCESSES = multiprocessing.get_context("fork")


def write_many(url, name, count, told):
    """Creates users and tells the version of each as soon as it is committed."""
    store = PolicyStore(create_engine_for(url))
    for number in range(count):
        told.send(store.create_user(f"{name}-{number}", actor=name, reason="race"))
    told.close()


def die_at(url, place):
    """Dies by SIGKILL when the given statement of a write is about to be sent, before its commit, or after it."""
    engine = create_engine_for(url)

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def on_statement(connection, cursor, statement, *_):
        if statement.startswith(place):
            die()

    if place == "commit":
        event.listen(engine, "commit", die)
    elif place != "afterwards":
        event.listen(engine, "before_cursor_execute", on_statement)
    PolicyStore(engine).add_grant("user:alice", "bank", actor="doomed", reason="test")
    die()


def start(target, *arguments):
    process = PROCESSES.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def start_writer(url, name, count):
    hear, tell = PROCESSES.Pipe(duplex=False)
    process = start(write_many, url, name, count, tell)
    tell.close()
    return process, hear


def everything_told(hear):
    told = []
    try:
        while True:
            told.append(hear.recv())
    except (EOFError, OSError):
        return told


def whole(engine, clock):
    """The chain verifies and ends at the version the database names."""
    with engine.connect() as connection:
        report = audit.verify(connection)
        report.require_ok()
        rows = list(audit.entries(connection))
        assert decision.policy_version(connection) == (rows[-1].policy_version if rows else 0)
    return rows


def test_fifty_writers_at_once(store, engine, how, clock):
    store.add_silo("bank", **how)
    with ThreadPoolExecutor(WRITERS) as pool:
        versions = list(pool.map(lambda n: store.create_user(f"user-{n}", **how), range(WRITERS)))
    assert sorted(versions) == list(range(2, WRITERS + 2))
    assert [row.policy_version for row in whole(engine, clock)] == list(range(1, WRITERS + 2))


def test_writers_in_several_processes_at_once(store, engine, url, clock):
    writers = [start_writer(url, f"p{n}", 13) for n in range(3)]
    versions = [version for _, hear in writers for version in everything_told(hear)]
    for process, _ in writers:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(versions) == list(range(1, 3 * 13 + 1))
    assert len(whole(engine, clock)) == 3 * 13


def test_of_writers_that_saw_the_same_version_one_wins(store, engine, how, clock):
    def attempt(number):
        try:
            return store.create_user(f"user-{number}", expected_version=0, **how)
        except VersionMismatch:
            return None

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(attempt, range(16)))
    assert [result for result in results if result is not None] == [1]
    assert len(whole(engine, clock)) == 1


def test_a_cycle_cannot_be_closed_by_two_writers_at_once(store, engine, how, clock):
    for group in "ab":
        store.create_group(group, **how)

    def join(pair):
        try:
            return store.add_member(pair[0], f"group:{pair[1]}", **how)
        except PolicyError as error:
            return error.code

    for _ in range(5):
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(join, [("a", "b"), ("b", "a")]))
        assert "group_cycle" in results and any(isinstance(result, int) for result in results)
        with engine.connect() as connection:
            [(parent, child)] = [
                (row["group_id"], row["members"][0]) for row in listing.groups(connection) if row["members"]
            ]
        store.remove_member(parent, child, **how)


@pytest.mark.parametrize(
    "place", ["INSERT INTO grants", "INSERT INTO audit", "UPDATE policy_state", "commit", "afterwards"]
)
def test_kill_9_in_the_middle_of_a_write_leaves_all_of_it_or_nothing(small, engine, url, clock, place, silos_of, how):
    version, rows = small.version(), len(whole(engine, clock))
    doomed = start(die_at, url, place)
    doomed.join(60)
    assert doomed.exitcode == -signal.SIGKILL
    done = place == "afterwards"
    assert small.version() == version + done
    assert len(whole(engine, clock)) == rows + done
    assert silos_of("alice", utc_now()) == (("bank",) if done else ())
    assert small.create_user("carol", **how) == version + done + 1, "and the lock is free again"


def test_kill_9_at_any_moment(store, engine, url, clock):
    dice = random.Random(7)
    for attempt in range(4):
        writer, hear = start_writer(url, f"w{attempt}", 10_000)
        first = hear.recv()
        time.sleep(0.05 + dice.random() / 5)
        os.kill(writer.pid, signal.SIGKILL)
        told = [first, *everything_told(hear)]
        writer.join()
        rows = whole(engine, clock)
        with engine.connect() as connection:
            users = {row["user_id"] for row in listing.users(connection)}
        assert {row.detail["user_id"] for row in rows} == users
        assert told[-1] <= len(rows) <= told[-1] + 1, "no acknowledged write is lost"


def test_a_dead_engine_leaves_a_database_that_opens(url, how):
    for expected in (1, 2):
        engine = create_engine_for(url)
        assert PolicyStore(engine).create_user(f"u{expected}", **how) == expected
        engine.dispose()
