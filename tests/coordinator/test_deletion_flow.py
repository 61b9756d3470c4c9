"""A deletion from filing to receipt: what each party sees, and what can never happen."""

import json

import pytest
from sqlalchemy import insert
from sqlalchemy.exc import IntegrityError

from coordinator import requests, revisions
from coordinator.db import now, reading, writing
from coordinator.errors import (
    BundleDestroyed,
    SiloQuarantined,
    SiloUnknown,
    SubjectInReason,
    SubjectInvalid,
)
from coordinator.models import deletion_requests
from seqr.dsse import Envelope
from seqr.keys import VerifyKey
from seqr.receipt import ReceiptReport, verify_receipt
from tests.coordinator.world import World, on_both

MAIN_LINE = [
    *("received", "verified", "accepted", "quarantined", "data_removed", "retraining", "validating"),
    *("published", "purged", "certified"),
]


def check_receipt(world: World, request_id: str, silo_id: str = "clinic") -> ReceiptReport:
    with reading(world.c.engine) as connection:
        envelope = Envelope.from_json(requests.receipt(connection, request_id))
    gateways = [VerifyKey.from_b64(gateway.key.signing_key) for gateway in world.gateways]
    return verify_receipt(envelope, world.c.key.public, [world.silos[silo_id].key.public], gateways)


@on_both("clinic")
def test_a_deletion_goes_down_the_main_line_and_ends_in_a_receipt_that_verifies(clinic: World) -> None:
    request_id = clinic.file("clinic")
    clinic.carry()
    assert clinic.history(request_id) == MAIN_LINE
    report = check_receipt(clinic, request_id)
    assert report.receipt.new_revision is not None and report.receipt.new_revision.revision == 2
    assert [one.revision for one in report.receipt.destroyed] == [1]
    assert clinic.revisions("clinic") == {1: "destroyed", 2: "active"}
    assert clinic.permitted() == ("clinic",)
    assert [row["action"] for row in clinic.audit("deletion.")][:4] == [f"deletion.{state}" for state in MAIN_LINE[:4]]
    assert [row["action"] for row in clinic.audit("deletion.")].count("deletion.certified") == 1


def test_the_silo_is_out_of_routing_before_the_filing_is_answered(clinic: World) -> None:
    clinic.file("clinic")
    assert clinic.permitted() == ()


def test_nobody_may_use_the_silo_until_no_gateway_can_hold_the_old_adapter(clinic: World) -> None:
    clinic.file("clinic")
    clinic.driver.tick()
    clinic.work()
    clinic.driver.tick()
    for gateway in clinic.gateways:
        gateway.poll(clinic.c, purge=False)
    clinic.driver.tick()
    assert clinic.revisions("clinic") == {1: "retired", 2: "active"}
    assert clinic.permitted() == ()
    clinic.poll()
    clinic.driver.tick()
    assert clinic.permitted() == ("clinic",)


def test_an_admin_who_reactivates_a_quarantined_silo_is_overruled(clinic: World) -> None:
    clinic.file("clinic")
    clinic.store.set_silo_status("clinic", "active", actor="ada", reason="impatient")
    clinic.driver.tick()
    assert clinic.permitted() == ()


@on_both("clinic")
def test_an_unknown_subject_is_rejected_with_the_reason_and_nothing_else_has_changed(clinic: World) -> None:
    request_id = clinic.file("clinic", "nobody.here")
    assert clinic.permitted() == ()
    clinic.carry(2)
    assert clinic.state(request_id) == "rejected"
    assert clinic.request(request_id)["code"] == "subject_unknown"
    assert clinic.revisions("clinic") == {1: "active"}
    assert clinic.permitted() == ("clinic",)


def test_a_rejected_request_does_not_lift_the_quarantine_of_another(clinic: World) -> None:
    unknown, known = clinic.file("clinic", "nobody.here"), clinic.file("clinic", "john.roe")
    clinic.driver.tick()
    clinic.work()
    clinic.driver.tick()
    assert (clinic.state(unknown), clinic.state(known)) == ("rejected", "quarantined")
    assert clinic.permitted() == ()
    clinic.carry()
    assert clinic.state(known) == "certified"
    assert clinic.permitted() == ("clinic",)


@on_both("clinic")
def test_an_unknown_silo_is_refused_and_nothing_is_stored(clinic: World) -> None:
    before = len(clinic.audit())
    with pytest.raises(SiloUnknown):
        clinic.file("Clinic")
    assert clinic.count(deletion_requests) == 0
    assert len(clinic.audit()) == before
    assert clinic.permitted() == ("clinic",)


@pytest.mark.parametrize("subject", ["", " jane", "jane\n", "jane\x00doe", "x" * 513])
def test_a_subject_that_no_order_could_carry_is_refused(clinic: World, subject: str) -> None:
    with pytest.raises(SubjectInvalid) as caught:
        clinic.file("clinic", subject)
    assert subject == "" or subject not in str(caught.value)
    assert clinic.count(deletion_requests) == 0


def test_a_reason_that_names_the_subject_is_refused(clinic: World) -> None:
    with pytest.raises(SubjectInReason):
        requests.file(clinic.c, "clinic", "jane.doe", "", "Jane.Doe wrote to us", "olga")


@on_both("clinic")
def test_a_second_request_for_the_same_person_is_a_duplicate_of_the_first(clinic: World) -> None:
    first = clinic.file("clinic")
    second = clinic.file("clinic")
    row = clinic.request(second)
    assert (row["state"], row["duplicate_of"], row["subject_sealed"]) == ("duplicate", first, None)
    clinic.carry()
    assert clinic.silos["clinic"].trained == 2
    third = clinic.file("clinic")
    assert clinic.state(third) == "quarantined", "after the first is closed it is a request of its own"


@on_both("clinic")
def test_a_name_lost_with_the_keystore_is_given_back_by_filing_again(clinic: World) -> None:
    first = clinic.file("clinic")
    clinic.c.subjects.forget(first)  # as after a restore: the keystore is in no backup
    clinic.carry()
    assert (clinic.state(first), clinic.request(first)["code"]) == ("failed", "job_cancelled")
    assert "lost with the keystore" in str(clinic.request(first)["message"])
    second = clinic.file("clinic")
    assert clinic.request(second)["duplicate_of"] == first
    requests.retry(clinic.c, first, "dpo", "its name is here again")
    clinic.carry()
    assert clinic.state(first) == "certified" and not clinic.c.subjects.remembers(first)


@on_both("clinic")
def test_an_offline_silo_is_waited_for_and_gets_its_order_when_it_returns(clinic: World) -> None:
    request_id = clinic.file("clinic")
    clinic.driver.tick()
    clinic.let_wait("clinic")
    clinic.driver.tick()
    assert clinic.state(request_id) == "waiting_for_silo"
    assert clinic.permitted() == ()
    clinic.carry()
    assert clinic.state(request_id) == "certified"


@on_both("clinic")
def test_two_requests_for_one_silo_are_carried_out_one_after_the_other(clinic: World) -> None:
    first, second = clinic.file("clinic", "jane.doe"), clinic.file("clinic", "john.roe")
    clinic.driver.tick()
    assert [clinic.request(one)["job_id"] is not None for one in (first, second)] == [True, False]
    clinic.carry(8)
    assert (clinic.state(first), clinic.state(second)) == ("certified", "certified")
    assert clinic.silos["clinic"].subjects == {"max.moe": 1}
    assert clinic.revisions("clinic") == {1: "destroyed", 2: "destroyed", 3: "active"}
    for one in (first, second):
        check_receipt(clinic, one)
    assert clinic.permitted() == ("clinic",)


def test_two_silos_do_not_wait_for_each_other(clinic: World) -> None:
    clinic.add_silo("bank")
    clinic.train("bank")
    stuck, other = clinic.file("clinic"), clinic.file("bank")
    for _ in range(4):
        clinic.driver.tick()
        clinic.let_wait("clinic")
        clinic.work("bank")
        clinic.driver.tick()
        clinic.poll()
    clinic.driver.tick()
    assert (clinic.state(stuck), clinic.state(other)) == ("waiting_for_silo", "certified")
    assert clinic.permitted() == ("bank",)


def test_no_training_is_accepted_while_a_request_holds_the_silo(clinic: World) -> None:
    clinic.file("clinic")
    with pytest.raises(SiloQuarantined):
        clinic.queue("clinic")


def test_the_bundle_of_a_destroyed_revision_cannot_be_had(clinic: World) -> None:
    old = clinic.gateways[0].listed(clinic.c, "active")[0]["revision_id"]
    clinic.file("clinic")
    clinic.carry()
    with pytest.raises(BundleDestroyed):
        revisions.bundle(clinic.c, old)


def test_warnings_come_at_50_80_and_100_percent_each_once(clinic: World) -> None:
    request_id = clinic.file("clinic")
    for days in (16.0, 9.0, 7.0):
        clinic.backdate(request_id, days)
        clinic.driver.tick()
        clinic.driver.tick()
    assert [row["percent"] for row in clinic.audit("deletion.clock")] == [50, 80, 100]
    with reading(clinic.c.engine) as connection:
        shown = requests.clock(requests.get(connection, request_id), now())
    assert shown["overdue"] and shown["days_left"] == -2.0


@on_both("clinic")
def test_every_audit_row_is_delivered_once_and_names_no_subject(clinic: World) -> None:
    clinic.file("clinic", "jane.doe")
    clinic.carry()
    rows = clinic.audit()
    events = [row["event_id"] for row in rows if "event_id" in row]
    assert len(events) == len(set(events)) > 15
    assert "jane" not in json.dumps(rows)


@on_both("clinic")
def test_the_database_itself_refuses_a_second_open_request_for_one_person(clinic: World) -> None:
    request_id = clinic.file("clinic")
    row = clinic.request(request_id)
    del row["number"]
    with pytest.raises(IntegrityError, match=r"(?i)unique"), writing(clinic.c.engine) as connection:
        connection.execute(insert(deletion_requests).values({**row, "request_id": "del-other"}))
