"""Kill -9 at any moment: the next coordinator goes on where the last one stopped; nothing is lost and nothing doubled.

The first test kills a process after each single change of either database, in turn, until a deletion has gone all the
way through. Between two kills the state on disk is all that is left.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from sqlalchemy import Connection, event

from coordinator import requests, revisions
from coordinator.db import reading
from coordinator.models import outbox
from tests.coordinator.test_deletion_flow import MAIN_LINE, check_receipt
from tests.coordinator.world import World

FORK = multiprocessing.get_context("fork")


def killed_after(commits: int, world: World, act: Callable[[World], object]) -> bool:
    """Run ``act`` in a process that dies when it would commit one change more; False: it got through."""

    def run() -> None:
        left = commits
        again = world.reopen()

        def count(connection: Connection) -> None:
            nonlocal left
            # The event comes just before the database commits: those counted before are kept, this one is lost.
            left -= "sqlite_begin" in connection.get_execution_options()
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        for engine in (again.c.engine, again.c.policy_engine):
            event.listen(engine, "commit", count)
        act(again)
        os._exit(0)

    process = FORK.Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def test_a_coordinator_killed_before_every_single_commit_of_a_deletion_finishes_it(clinic: World) -> None:
    request_id = requests.file(clinic.c, "clinic", "jane.doe", "", "art. 17", "olga")
    clinic.c.close()
    kills, step = 0, 0
    while True:
        # Every attempt gets one change further than the one before.
        died = killed_after(1, clinic, lambda again: again.driver.tick())
        step += 1
        kills += died
        if not died:
            other = clinic.reopen()
            assert other.state(request_id) not in ("received", "verified", "accepted")
            assert other.permitted() == () or other.state(request_id) in ("purged", "certified")
            other.work()
            other.poll()
            done = other.state(request_id) == "certified" and other.count(outbox) == 0
            other.close()
            if done:
                break
        assert step < 200
    final = clinic.reopen()
    final.driver.tick()
    assert kills > 40
    assert final.history(request_id) == MAIN_LINE
    assert final.revisions("clinic") == {1: "destroyed", 2: "active"}
    assert final.permitted() == ("clinic",)
    assert clinic.silos["clinic"].trained == 2
    check_receipt(final, request_id)
    rows = final.audit()
    events = [row["event_id"] for row in rows if "event_id" in row]
    assert len(events) == len(set(events))
    assert [row["action"] for row in rows if row["action"] == "deletion.certified"] == ["deletion.certified"]
    assert [row["after"] for row in rows if row["action"] == "silo.status"] == ["quarantined", "active"]
    final.close()


@pytest.mark.parametrize("commits", range(4))
def test_a_reply_whose_taking_was_killed_is_taken_once_when_it_is_repeated(clinic: World, commits: int) -> None:
    clinic.queue("clinic")
    job = clinic.claim()[0]
    reply = clinic.silos["clinic"].answer(job, clinic.c)
    clinic.c.close()
    killed_after(commits, clinic, lambda again: again.jobs.complete(job.job_id, reply))
    again = clinic.reopen()
    again.jobs.requeue_all_dispatched()
    for resent in again.claim("clinic"):
        assert resent == job
        again.jobs.complete(resent.job_id, reply)
    again.poll()
    assert again.revisions("clinic") == {1: "destroyed", 2: "active"}
    with reading(again.c.engine) as connection:
        active = revisions.listing(connection)[0]
    assert revisions.bundle(again.c, active["revision_id"]) == reply.sealed
    again.close()


@pytest.mark.parametrize("commits", range(5))
def test_a_filing_that_was_killed_either_left_nothing_or_is_carried_through(clinic: World, commits: int) -> None:
    clinic.c.close()
    killed_after(commits, clinic, lambda again: again.file("clinic"))
    again = clinic.reopen()
    again.driver.tick()
    with reading(again.c.engine) as connection:
        found = requests.listing(connection)
    if found:
        assert again.permitted() == ()
        again.carry()
        assert again.state(found[0]["request_id"]) == "certified"
        second = again.file("clinic", "john.roe")
        again.carry()
        assert again.state(second) == "certified"
    else:
        assert again.permitted() == ("clinic",)
    again.close()


def start(clinic: World) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "seqr", "coordinator", "serve", "--port", "0"]
    environment = {
        **os.environ,
        "SEQR_COORDINATOR_DIRECTORY": str(clinic.settings.directory),
        "SEQR_COORDINATOR_DATABASE_URL": clinic.settings.database_url,
        "SEQR_COORDINATOR_POLICY_DATABASE_URL": clinic.settings.policy_database_url,
        "SEQR_COORDINATOR_LOOP_SECONDS": "0.05",
        "SEQR_COORDINATOR_SILO_GRACE_SECONDS": "0",
    }
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)


def wait_for(world: World, request_id: str, *states: str) -> None:
    deadline = time.monotonic() + 30
    while world.state(request_id) not in states:
        assert time.monotonic() < deadline, world.state(request_id)
        time.sleep(0.03)


def kill(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait(10)


def test_the_served_coordinator_killed_twice_on_the_way_resumes_each_time(clinic: World) -> None:
    request_id = requests.file(clinic.c, "clinic", "jane.doe", "", "art. 17", "olga")
    process = start(clinic)
    try:
        wait_for(clinic, request_id, "waiting_for_silo")
        assert clinic.permitted() == ()
        kill(process)
        clinic.work()
        process = start(clinic)
        wait_for(clinic, request_id, "validating")
        kill(process)
        clinic.poll()
        process = start(clinic)
        wait_for(clinic, request_id, "certified")
    finally:
        kill(process)
    clinic.driver.tick()
    check_receipt(clinic, request_id)
    assert [state for state in clinic.history(request_id) if state != "waiting_for_silo"] == MAIN_LINE
    assert clinic.silos["clinic"].trained == 2
