"""Joining: anyone may ask, only a fingerprint read out by its owner is let in, and one key belongs to one silo."""

from dataclasses import replace
from datetime import timedelta

import pytest
from sqlalchemy import update

from coordinator import enrolment, silos
from coordinator.db import now, writing
from coordinator.errors import (
    EnrolmentProofInvalid,
    EnrolmentQueueFull,
    FingerprintMismatch,
    IllegalTransition,
    KeyInUse,
    NodeKeyInvalid,
    SigningKeyInvalid,
    SiloAlreadyEnrolled,
    SiloIdInvalid,
    SiloUnknown,
)
from coordinator.models import enrolments
from seqr.keys import SigningKey
from tests.coordinator.world import Silo, World, on_both


def ask(world: World, silo: Silo, most: int = 100) -> dict[str, object]:
    return enrolment.enrol(world.c.engine, silo.asks(), most)


def approve(world: World, silo: Silo) -> None:
    enrolment.approve(world.c.engine, silo.silo_id, silo.key.public.fingerprint, "ada", "test")
    world.driver.tick()


@on_both("world")
def test_an_approved_silo_is_known_to_policy_and_to_the_superlink(world: World) -> None:
    silo = Silo("clinic")
    assert ask(world, silo)["state"] == "pending"
    assert world.nodes.keys == {}
    approve(world, silo)
    assert world.nodes.keys == {silo.node_key: "clinic"} == silos.approved_nodes(world.c.engine)
    assert world.policy_status("clinic") == "active"


def test_asking_again_with_the_same_keys_changes_nothing(world: World) -> None:
    silo = Silo("clinic")
    assert ask(world, silo) == ask(world, silo)


def test_an_impostor_who_asks_first_cannot_keep_the_owner_out(world: World) -> None:
    impostor, owner = Silo("clinic"), Silo("clinic")
    ask(world, impostor)
    ask(world, owner)
    approve(world, owner)
    assert world.nodes.keys == {owner.node_key: "clinic"}
    with pytest.raises(SiloAlreadyEnrolled):
        approve(world, impostor)


def test_a_fingerprint_that_nobody_asked_with_is_refused(world: World) -> None:
    ask(world, Silo("clinic"))
    stranger = SigningKey.generate().public.fingerprint
    with pytest.raises(FingerprintMismatch):
        enrolment.approve(world.c.engine, "clinic", stranger, "ada", "test")
    with pytest.raises(SiloUnknown):
        enrolment.approve(world.c.engine, "bank", stranger, "ada", "test")
    assert silos.approved_nodes(world.c.engine) == {}


def test_an_enrolled_silo_cannot_be_enrolled_again(world: World) -> None:
    world.add_silo("clinic")
    with pytest.raises(SiloAlreadyEnrolled, match="to enrol with new keys, ask the admin to suspend it first"):
        ask(world, Silo("clinic"))


def test_one_key_belongs_to_one_silo(world: World) -> None:
    clinic = world.add_silo("clinic")
    for thief in (Silo("bank", key=clinic.key), Silo("bank", node_key=clinic.node_key)):
        with pytest.raises(KeyInUse, match="key is another silo's; `seqr silo init` in a new directory"):
            ask(world, thief)


@on_both("world")
def test_two_that_ask_with_one_key_do_not_both_get_in(world: World) -> None:
    first = Silo("clinic")
    second = Silo("bank", node_key=first.node_key)
    ask(world, first)
    ask(world, second)
    approve(world, first)
    with pytest.raises(KeyInUse):
        approve(world, second)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"silo_id": "other"}, EnrolmentProofInvalid),
        ({"display_name": "Other"}, EnrolmentProofInvalid),
        ({"signing_key": SigningKey.generate().public.to_b64()}, EnrolmentProofInvalid),
        ({"node_key": Silo("x").node_key}, EnrolmentProofInvalid),
        ({"silo_id": "../etc"}, SiloIdInvalid),
        ({"silo_id": ""}, SiloIdInvalid),
        ({"silo_id": "x" * 65}, SiloIdInvalid),
        ({"silo_id": "klinik\n"}, SiloIdInvalid),
        ({"display_name": "a\nb"}, SiloIdInvalid),
        ({"signing_key": "AAAA"}, SigningKeyInvalid),
        ({"node_key": "ssh-rsa AAAA"}, NodeKeyInvalid),
    ],
)
def test_a_request_that_its_own_key_did_not_sign_is_refused(
    world: World, changes: dict[str, str], error: type[Exception]
) -> None:
    with pytest.raises(error):
        enrolment.enrol(world.c.engine, Silo("clinic").asks(**changes), 100)
    assert world.count(enrolments) == 0


@pytest.mark.parametrize("proof", [b"", b"{}", b"x" * 100_000])
def test_a_request_without_a_readable_proof_is_refused(world: World, proof: bytes) -> None:
    with pytest.raises(EnrolmentProofInvalid):
        enrolment.enrol(world.c.engine, replace(Silo("clinic").asks(), proof=proof), 100)


@on_both("world")
def test_the_list_of_those_who_ask_is_bounded_and_old_requests_make_room(world: World) -> None:
    for number in range(3):
        ask(world, Silo(f"silo-{number}"), most=3)
    with pytest.raises(EnrolmentQueueFull):
        ask(world, Silo("late"), most=3)
    with writing(world.c.engine) as connection:
        connection.execute(update(enrolments).values(created_at=now() - timedelta(days=31)))
    ask(world, Silo("late"), most=3)
    for _ in range(4):
        ask(world, Silo("late"))
    with pytest.raises(EnrolmentQueueFull):
        ask(world, Silo("late"))


def test_a_rejected_request_is_gone_and_may_be_made_again(world: World) -> None:
    silo = Silo("clinic")
    ask(world, silo)
    assert enrolment.reject(world.c.engine, "clinic", "ada", "unknown caller") == 1
    with pytest.raises(SiloUnknown):
        approve(world, silo)
    ask(world, silo)
    approve(world, silo)


@on_both("world")
def test_a_suspended_silo_is_cut_off_everywhere_and_comes_back_with_its_key_or_a_new_one(world: World) -> None:
    silo = world.add_silo("clinic")
    assert world.permitted() == ("clinic",)
    silos.suspend(world.c.engine, "clinic", "ada", "audit")
    world.driver.tick()
    assert (world.nodes.keys, world.permitted()) == ({}, ())
    with pytest.raises(IllegalTransition):
        silos.suspend(world.c.engine, "clinic", "ada", "again")
    approve(world, silo)
    assert world.nodes.keys == {silo.node_key: "clinic"}
    silos.suspend(world.c.engine, "clinic", "ada", "keys lost")
    fresh = Silo("clinic")
    ask(world, fresh)
    approve(world, fresh)
    assert world.nodes.keys == {fresh.node_key: "clinic"}
    assert world.permitted() == ("clinic",)


def test_a_superlink_that_is_down_hears_of_the_decision_when_it_is_back(world: World) -> None:
    silo = Silo("clinic")
    ask(world, silo)
    world.nodes.down = True
    approve(world, silo)
    assert world.policy_status("clinic") == "active"
    world.nodes.down = False
    world.driver.tick()
    assert world.nodes.keys == {silo.node_key: "clinic"}


def test_a_decision_that_policy_has_not_heard_of_reaches_it_after_a_restart(world: World) -> None:
    silo = Silo("clinic")
    ask(world, silo)
    enrolment.approve(world.c.engine, "clinic", silo.key.public.fingerprint, "ada", "test")
    again = world.reopen()
    again.driver.tick()
    assert world.policy_status("clinic") == "active"
    again.close()


def test_suspending_a_silo_under_deletion_leaves_it_suspended_afterwards(world: World) -> None:
    world.add_plan()
    world.add_silo("clinic")
    world.train("clinic")
    request_id = world.file("clinic")
    silos.suspend(world.c.engine, "clinic", "ada", "audit")
    world.carry()
    assert world.state(request_id) == "quarantined", "a suspended silo gets no orders"
    approve(world, world.silos["clinic"])
    assert world.permitted() == ()
    world.carry()
    assert (world.state(request_id), world.permitted()) == ("certified", ("clinic",))
