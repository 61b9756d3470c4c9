"""The job table: one live job per silo, replies taken once, and nothing a silo says is believed unchecked."""

import threading
from dataclasses import replace

import pytest
from sqlalchemy import insert, update
from sqlalchemy.exc import IntegrityError

from coordinator import job_queue, jobs
from coordinator.db import now, reading, writing
from coordinator.errors import (
    IllegalTransition,
    JobAlreadyLive,
    JobKindInvalid,
    JobUnknown,
    PlanMissing,
    SiloNotApproved,
    SiloUnknown,
)
from coordinator.jobs import JobReply
from coordinator.models import jobs as rows
from coordinator.silos import suspend
from seqr.dsse import Envelope
from seqr.job import verify_job
from seqr.keys import SigningKey
from tests.coordinator.world import World, on_both


def state(world: World, job_id: str) -> tuple[str, str | None]:
    with reading(world.c.engine) as connection:
        job = job_queue.get(connection, job_id)
        return job["state"], job["code"]


@on_both("clinic")
def test_a_silo_has_one_live_job(clinic: World) -> None:
    clinic.queue("clinic")
    with pytest.raises(JobAlreadyLive, match="has a job already; wait for it, or `seqr coordinator cancel` it"):
        clinic.queue("clinic", "ping")
    clinic.work()
    clinic.queue("clinic", "ping")


@on_both("clinic")
def test_the_database_itself_refuses_a_second_live_job(clinic: World) -> None:
    job_id = clinic.queue("clinic")
    with reading(clinic.c.engine) as connection:
        row = dict(job_queue.get(connection, job_id))
    with pytest.raises(IntegrityError), writing(clinic.c.engine) as connection:
        connection.execute(insert(rows).values({**row, "job_id": "job-other"}))


def test_only_connected_silos_get_their_orders(clinic: World) -> None:
    clinic.add_silo("bank")
    clinic.queue("clinic")
    bank = clinic.queue("bank")
    assert clinic.claim("nobody") == []
    assert [job.job_id for job in clinic.claim("bank", "unknown")] == [bank]
    assert clinic.claim("bank") == []


def test_an_order_is_signed_and_names_silo_plan_revision_and_nonce(clinic: World) -> None:
    job_id = clinic.queue("clinic")
    job = clinic.claim()[0]
    order = verify_job(Envelope.from_json(job.order_envelope), clinic.c.key.public)
    assert (order.job_id, order.silo_id, order.kind, order.revision) == (job_id, "clinic", "train", 2)
    assert Envelope.from_json(job.plan_envelope).payload.find(order.plan_id.encode()) > 0


def test_an_order_sent_again_has_the_same_bytes(clinic: World) -> None:
    job_id = clinic.queue("clinic")
    first = clinic.claim()[0]
    clinic.jobs.requeue(job_id, "the node went away")
    assert clinic.claim()[0] == first


def test_an_order_that_ran_out_gets_a_new_nonce(clinic: World) -> None:
    clinic.queue("clinic")
    first = clinic.claim()[0]
    with writing(clinic.c.engine) as connection:
        connection.execute(update(rows).values(expires_at=now()))
    clinic.jobs.requeue_expired()
    second = clinic.claim()[0]
    orders = [verify_job(Envelope.from_json(one.order_envelope), clinic.c.key.public) for one in (first, second)]
    assert orders[0].nonce != orders[1].nonce
    assert orders[0].revision == orders[1].revision


@on_both("clinic")
def test_a_reply_that_comes_twice_makes_one_revision(clinic: World) -> None:
    clinic.queue("clinic")
    job = clinic.claim()[0]
    reply = clinic.silos["clinic"].answer(job, clinic.c)
    assert clinic.jobs.complete(job.job_id, reply) == "succeeded"
    assert clinic.jobs.complete(job.job_id, reply) == "succeeded"
    assert clinic.jobs.complete(job.job_id, JobReply("error", "late")) == "succeeded"
    assert clinic.revisions("clinic") == {1: "active", 2: "staged"}
    clinic.driver.tick()
    assert [row["job_id"] for row in clinic.audit("job.succeeded")].count(job.job_id) == 1


@on_both("clinic")
def test_a_late_reply_to_a_job_that_was_queued_again_is_taken(clinic: World) -> None:
    job_id = clinic.queue("clinic")
    job = clinic.claim()[0]
    clinic.jobs.requeue(job_id, "the node went away")
    assert clinic.jobs.complete(job_id, JobReply("error", "aborted")) == "queued"
    assert clinic.jobs.complete(job_id, clinic.silos["clinic"].answer(job, clinic.c)) == "succeeded"
    assert clinic.claim() == []


def test_the_reply_to_a_cancelled_job_is_dropped(clinic: World) -> None:
    job_id = clinic.queue("clinic")
    job = clinic.claim()[0]
    with writing(clinic.c.engine) as connection:
        job_queue.cancel(connection, job_id, "ada", "test")
    assert clinic.jobs.complete(job_id, clinic.silos["clinic"].answer(job, clinic.c)) == "cancelled"
    assert clinic.revisions("clinic") == {1: "active"}
    with pytest.raises(IllegalTransition), writing(clinic.c.engine) as connection:
        job_queue.cancel(connection, job_id, "ada", "again")


@on_both("clinic")
def test_a_restarted_server_sends_everything_again_without_counting_an_attempt(clinic: World) -> None:
    job_id = clinic.queue("clinic")
    clinic.claim()
    assert clinic.jobs.requeue_all_dispatched() == 1
    assert clinic.jobs.requeue_all_dispatched() == 0
    assert state(clinic, job_id) == ("queued", None)
    assert len(clinic.claim()) == 1


def test_a_job_that_keeps_getting_lost_is_given_up(clinic: World) -> None:
    job_id = clinic.queue("clinic")
    for _ in range(clinic.settings.job_attempts):
        clinic.claim()
        clinic.jobs.requeue(job_id, "the node went away")
    assert state(clinic, job_id) == ("failed", "attempts_exhausted")
    clinic.jobs.requeue(job_id, "once more")
    assert state(clinic, job_id)[0] == "failed"


@pytest.mark.parametrize(
    ("code", "new_order"), [("silo_busy", False), ("reply_destroyed", True), ("order_expired", True)]
)
def test_a_silo_that_cannot_answer_this_order_is_asked_again(clinic: World, code: str, new_order: bool) -> None:
    job_id = clinic.queue("clinic")
    first = clinic.claim()[0]
    assert clinic.jobs.complete(job_id, JobReply("error", code, "later")) == "queued"
    assert (clinic.claim()[0] != first) == new_order


def test_numbers_only_go_up_whatever_became_of_the_job(clinic: World) -> None:
    clinic.silos["clinic"].fail_with = "no_records"
    clinic.queue("clinic")
    clinic.work()
    clinic.train("clinic")
    clinic.queue("clinic", "ping")
    clinic.work()
    clinic.train("clinic")
    assert clinic.revisions("clinic") == {1: "destroyed", 3: "destroyed", 4: "active"}


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (JobReply("ok"), "reply_incomplete"),
        (JobReply("ok", sealed=b""), "reply_incomplete"),
        (JobReply("error", "no_records", "there is nothing to train on"), "no_records"),
        (JobReply("error", "../../etc", "x"), "silo_error"),
        (JobReply("error", "x" * 100, "x"), "silo_error"),
        (JobReply("nonsense", "", ""), "silo_error"),
    ],
)
def test_a_reply_without_an_adapter_fails_the_job_by_name(clinic: World, reply: JobReply, code: str) -> None:
    job_id = clinic.queue("clinic")
    clinic.claim()
    assert clinic.jobs.complete(job_id, reply) == "failed"
    assert state(clinic, job_id) == ("failed", code)


def test_a_bundle_beyond_the_limit_is_refused(clinic: World) -> None:
    small = replace(clinic.c, settings=clinic.settings.model_copy(update={"max_bundle_bytes": 10}))
    job_id = clinic.queue("clinic")
    clinic.claim()
    assert jobs.JobTable(small).complete(job_id, JobReply("ok", sealed=b"x" * 11)) == "failed"
    assert state(clinic, job_id)[1] == "bundle_too_large"


@pytest.mark.parametrize(
    ("forgery", "code", "sentence"),
    [
        ("missing", "attestation_invalid", "carries no erasure attestation"),
        ("unreadable", None, ""),
        ("other key", None, ""),
        ("other request", "attestation_invalid", "is for request_id del-0, expected del-"),
        ("other model", "attestation_invalid", "another base model or seed"),
    ],
)
def test_an_erasure_that_the_silo_did_not_attest_is_not_believed(
    clinic: World, forgery: str, code: str | None, sentence: str
) -> None:
    request_id = clinic.file("clinic")
    clinic.driver.tick()
    job = clinic.claim()[0]
    silo = clinic.silos["clinic"]
    if forgery == "other key":
        silo.key = SigningKey.generate()
    reply = silo.answer(job, clinic.c)
    if forgery == "missing":
        reply = replace(reply, attestation=None)
    elif forgery == "unreadable":
        reply = replace(reply, attestation=b"{}")
    elif forgery == "other request":
        order = verify_job(Envelope.from_json(job.order_envelope), clinic.c.key.public)
        reply = replace(reply, attestation=silo.attest(replace(order, request_id="del-0"), job.plan_envelope))
    elif forgery == "other model":
        order = verify_job(Envelope.from_json(job.order_envelope), clinic.c.key.public)
        reply = replace(
            reply, attestation=silo.attest(order, job.plan_envelope, base_model_digest="sha256:" + "9" * 64)
        )
    assert clinic.jobs.complete(job.job_id, reply) == "failed"
    clinic.driver.tick()
    assert clinic.state(request_id) == "failed"
    told = clinic.request(request_id)
    assert sentence in told["message"] and (code is None or told["code"] == code)
    assert clinic.revisions("clinic") == {1: "active"}
    assert clinic.permitted() == ()


def test_a_silo_that_repeats_the_subject_in_its_error_is_not_quoted(clinic: World) -> None:
    request_id = clinic.file("clinic")
    clinic.driver.tick()
    job = clinic.claim()[0]
    clinic.jobs.complete(job.job_id, JobReply("error", "data_error", "the row of Jane.Doe is broken"))
    clinic.driver.tick()
    assert "jane" not in str(clinic.request(request_id)["message"]).lower()
    assert clinic.request(request_id)["code"] == "data_error"


@on_both("clinic")
def test_jobs_follow_to_a_new_plan_until_they_are_sent(clinic: World) -> None:
    clinic.queue("clinic")
    plan = clinic.add_plan(seed=2)
    order = verify_job(Envelope.from_json(clinic.claim()[0].order_envelope), clinic.c.key.public)
    assert order.plan_id == plan.plan_id


def test_a_suspended_silo_gets_no_work(clinic: World) -> None:
    suspend(clinic.c.engine, "clinic", "ada", "test")
    with pytest.raises(SiloNotApproved):
        clinic.queue("clinic")


def test_work_for_unknown_silos_of_unknown_kinds_or_without_a_plan_is_refused(world: World) -> None:
    with pytest.raises(SiloUnknown):
        world.queue("nowhere")
    world.add_silo("clinic")
    with pytest.raises(PlanMissing):
        world.queue("clinic")
    for kind in ("erase", "format"):
        with pytest.raises(JobKindInvalid):
            world.queue("clinic", kind)
    with pytest.raises(JobUnknown):
        world.jobs.complete("job-0", JobReply("ok"))


@on_both("clinic")
def test_two_processes_never_claim_the_same_job(clinic: World) -> None:
    silos = ["clinic"] + [f"silo-{number}" for number in range(5)]
    for silo_id in silos[1:]:
        clinic.add_silo(silo_id)
    for silo_id in silos:
        clinic.queue(silo_id, "ping")
    claimed: list[str] = []

    def claim() -> None:
        other = clinic.reopen()
        for _ in range(3):
            claimed.extend(job.job_id for job in other.jobs.claim_next(set(silos)))
        other.close()

    threads = [threading.Thread(target=claim) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claimed) == len(set(claimed)) == len(silos)
