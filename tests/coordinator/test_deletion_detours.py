"""Deletions with detours: failures and retries, nothing left or never trained, several gateways, withdrawals."""

import pytest

from coordinator import job_queue, requests, revisions
from coordinator.db import reading
from coordinator.deletions import State
from coordinator.errors import (
    DeletionTooFarToWithdraw,
    IllegalTransition,
)
from tests.coordinator.test_deletion_flow import check_receipt
from tests.coordinator.world import Gateway, World, on_both


@on_both("clinic")
def test_a_failed_erasure_keeps_the_quarantine_and_can_be_retried(clinic: World) -> None:
    clinic.silos["clinic"].fail_with = "training_failed"
    request_id = clinic.file("clinic")
    clinic.carry(2)
    assert clinic.state(request_id) == "failed"
    assert clinic.request(request_id)["code"] == "training_failed"
    assert clinic.permitted() == ()
    requests.retry(clinic.c, request_id, "olga", "the disk has room again")
    clinic.carry()
    assert clinic.state(request_id) == "certified"
    check_receipt(clinic, request_id)


def test_unknown_after_an_earlier_order_never_reopens_the_silo(clinic: World) -> None:
    clinic.silos["clinic"].fail_with = "training_failed"
    request_id = clinic.file("clinic")
    clinic.carry(2)
    clinic.silos["clinic"].removed.clear()
    requests.retry(clinic.c, request_id, "olga", "again")
    clinic.carry(2)
    assert clinic.state(request_id) == "failed"
    assert clinic.permitted() == ()


def test_a_new_adapter_that_intake_refuses_fails_the_request_with_intakes_reason(clinic: World) -> None:
    clinic.gateways[0].refuse_with = "norm_out_of_bounds"
    request_id = clinic.file("clinic")
    clinic.carry(2)
    assert clinic.state(request_id) == "failed"
    assert clinic.request(request_id)["code"] == "norm_out_of_bounds"
    assert clinic.permitted() == ()
    clinic.gateways[0].refuse_with = None
    requests.retry(clinic.c, request_id, "olga", "the gateway is repaired")
    clinic.carry()
    assert clinic.state(request_id) == "certified"
    assert clinic.revisions("clinic") == {1: "destroyed", 2: "destroyed", 3: "active"}
    check_receipt(clinic, request_id)


@on_both("clinic")
def test_when_no_record_is_left_the_silo_has_no_adapter_any_more(clinic: World) -> None:
    clinic.silos["clinic"].subjects = {"jane.doe": 1}
    clinic.train("clinic")
    request_id = clinic.file("clinic")
    clinic.carry()
    assert clinic.state(request_id) == "certified"
    assert set(clinic.revisions("clinic").values()) == {"destroyed"}
    assert check_receipt(clinic, request_id).receipt.new_revision is None


def test_records_that_training_never_reached_leave_the_adapter_as_it_was(clinic: World) -> None:
    silo = clinic.silos["clinic"]
    same = silo.adapter_digest()
    silo.adapter_digest = lambda: same  # type: ignore[method-assign]
    request_id = clinic.file("clinic")
    clinic.carry()
    assert clinic.state(request_id) == "certified"
    report = check_receipt(clinic, request_id)
    assert any("never depended on them" in line for line in report.verified)
    clinic.train("clinic")
    assert clinic.permitted() == ("clinic",)


def test_a_failed_request_lets_the_next_one_pass_and_can_still_be_finished(clinic: World) -> None:
    clinic.gateways[0].refuse_with = "norm_out_of_bounds"
    first, second = clinic.file("clinic", "jane.doe"), clinic.file("clinic", "john.roe")
    clinic.carry(1)
    clinic.gateways[0].refuse_with = None
    clinic.carry()
    assert (clinic.state(first), clinic.state(second)) == ("failed", "certified")
    assert clinic.permitted() == ()
    requests.retry(clinic.c, first, "olga", "the gateway is repaired")
    clinic.carry()
    assert clinic.state(first) == "certified"
    check_receipt(clinic, first)
    assert clinic.permitted() == ("clinic",)


def test_a_receipt_that_would_not_verify_is_never_handed_out(clinic: World) -> None:
    clinic.silos["clinic"].last_digest = "ab" * 32  # trained beside the federation, never handed in
    request_id = clinic.file("clinic")
    clinic.carry()
    assert clinic.state(request_id) == "purged"
    assert clinic.request(request_id)["code"] == "receipt_inconsistent"
    assert clinic.revisions("clinic") == {1: "destroyed", 2: "active"}


@pytest.mark.parametrize("seen", [True, False])
def test_an_adapter_that_was_handed_in_but_never_served_is_in_the_receipt_too(clinic: World, seen: bool) -> None:
    silo, gateway = clinic.silos["clinic"], clinic.gateways[0]
    silo.subjects["new.person"] = 1
    clinic.queue("clinic")
    clinic.work()
    if seen:
        gateway.refuse_with = "norm_out_of_bounds"
        clinic.poll()
        gateway.refuse_with = None
    request_id = clinic.file("clinic")
    clinic.driver.tick()
    clinic.work()
    erased = gateway.listed(clinic.c, "staged")[-1]
    revisions.admit(clinic.c, erased["revision_id"], erased["adapter_digest"], "gw")
    clinic.carry()
    assert clinic.state(request_id) == "certified"
    assert set(clinic.revisions("clinic").items()) == {(1, "destroyed"), (2, "destroyed"), (3, "active")}
    assert [one.revision for one in check_receipt(clinic, request_id).receipt.destroyed] == [1, 2]


def test_a_silo_that_never_trained_can_be_asked_all_the_same(world: World) -> None:
    world.add_plan()
    world.add_silo("bank")
    request_id = world.file("bank")
    world.carry()
    assert world.state(request_id) == "certified"
    assert check_receipt(world, request_id, "bank").receipt.old_revision is None


def test_every_gateway_of_the_plan_has_to_swear(world: World) -> None:
    one, other = Gateway(), Gateway()
    world.add_plan(one, other)
    world.add_silo("clinic")
    world.train("clinic")
    request_id = world.file("clinic")
    world.gateways = [one]
    world.carry()
    assert world.state(request_id) == "published"
    assert world.permitted() == ()
    world.gateways = [one, other]
    world.carry(1)
    assert world.state(request_id) == "certified"
    check_receipt(world, request_id)


def test_without_a_plan_the_request_says_what_it_needs_and_goes_on_by_itself(world: World) -> None:
    world.add_silo("bank")
    request_id = world.file("bank")
    world.driver.tick()
    assert world.state(request_id) == "needs_input"
    assert world.request(request_id)["code"] == "plan_missing"
    world.add_plan()
    world.carry()
    assert world.state(request_id) == "certified"


def test_a_queued_training_makes_way_and_a_running_one_is_waited_for(clinic: World) -> None:
    queued = clinic.queue("clinic")
    clinic.file("clinic")
    clinic.driver.tick()
    assert clinic.claim()[0].job_id != queued
    with reading(clinic.c.engine) as connection:
        assert job_queue.get(connection, queued)["state"] == "cancelled"


def test_an_adapter_trained_while_the_request_was_filed_is_destroyed_too(clinic: World) -> None:
    clinic.queue("clinic")
    running = clinic.claim()
    request_id = clinic.file("clinic")
    clinic.driver.tick()
    assert clinic.request(request_id)["job_id"] is None, "one job at a time"
    for job in running:
        clinic.jobs.complete(job.job_id, clinic.silos["clinic"].answer(job, clinic.c))
    clinic.poll()
    assert clinic.permitted() == ()
    clinic.carry()
    assert clinic.state(request_id) == "certified"
    assert clinic.revisions("clinic") == {1: "destroyed", 2: "destroyed", 3: "active"}


@on_both("clinic")
def test_a_request_can_be_withdrawn_until_the_silo_has_been_told(clinic: World) -> None:
    request_id = clinic.file("clinic")
    clinic.driver.tick()
    requests.withdraw(clinic.c, request_id, "olga", "the person changed their mind")
    clinic.driver.tick()
    assert clinic.state(request_id) == "withdrawn"
    assert clinic.permitted() == ("clinic",)
    assert clinic.claim() == []
    with pytest.raises(IllegalTransition):
        requests.withdraw(clinic.c, request_id, "olga", "again")


def test_a_request_cannot_be_withdrawn_once_the_order_is_out(clinic: World) -> None:
    request_id = clinic.file("clinic")
    clinic.driver.tick()
    clinic.claim()
    with pytest.raises(DeletionTooFarToWithdraw):
        requests.withdraw(clinic.c, request_id, "olga", "too late")
    assert clinic.permitted() == ()


def test_a_silo_that_was_suspended_or_vetoed_before_stays_so_after_its_deletion(clinic: World) -> None:
    clinic.store.set_silo_status("clinic", "suspended", actor="ada", reason="under review")
    request_id = clinic.file("clinic")
    clinic.carry()
    assert clinic.state(request_id) == "certified"
    assert clinic.policy_status("clinic") == "suspended"


def test_only_failed_requests_can_be_retried(clinic: World) -> None:
    request_id = clinic.file("clinic")
    with pytest.raises(IllegalTransition):
        requests.retry(clinic.c, request_id, "olga", "hurry")
    assert clinic.state(request_id) == State.QUARANTINED
