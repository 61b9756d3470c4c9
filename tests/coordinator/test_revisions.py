"""The registry of adapters: one active per silo, nothing old comes back, a destroyed bundle cannot be opened."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert
from sqlalchemy.exc import IntegrityError

from coordinator import job_queue, purging, revisions
from coordinator.db import reading, writing
from coordinator.errors import (
    AdapterTombstoned,
    AttestationMismatch,
    BundleCorrupt,
    BundleDestroyed,
    DigestInvalid,
    IllegalTransition,
    PurgeInvalid,
    RevisionSuperseded,
    RevisionUnknown,
)
from coordinator.jobs import JobReply
from coordinator.models import revisions as rows
from coordinator.models import tombstones
from seqr.keys import SigningKey
from seqr.purge import PurgeAcknowledgement, sign_purge
from tests.coordinator.world import Gateway, World, on_both

NEW = "ab" * 32


def staged(world: World, sealed: bytes = b"SEALED " + NEW.encode()) -> dict[str, Any]:
    job_id = world.queue("clinic")
    world.claim()
    world.jobs.complete(job_id, JobReply("ok", sealed=sealed))
    return world.gateways[0].listed(world.c, "staged")[-1]


def test_what_a_gateway_is_told_is_what_intake_has_to_expect(clinic: World) -> None:
    one = staged(clinic)
    with reading(clinic.c.engine) as connection:
        nonce = job_queue.listing(connection, "clinic")[0]["nonce"]
    assert one["expectation"] == {
        "silo_keys": [clinic.silos["clinic"].key.public.to_b64()],
        "job_nonce": nonce,
        "revision": 2,
        "tombstoned_digests": [],
    }
    assert (one["state"], one["silo_id"], one["adapter_digest"]) == ("staged", "clinic", None)


@on_both("clinic")
def test_admission_makes_one_active_and_retires_its_predecessor_in_one_step(clinic: World) -> None:
    before = clinic.gateways[0].listed(clinic.c, "active")[0]["revision_id"]
    one = staged(clinic)
    assert revisions.admit(clinic.c, one["revision_id"], NEW, "gw") == [before]
    assert revisions.admit(clinic.c, one["revision_id"], NEW, "gw") == [before], "saying it again changes nothing"
    assert clinic.revisions("clinic") == {1: "retired", 2: "active"}
    with pytest.raises(IllegalTransition):
        revisions.admit(clinic.c, one["revision_id"], "cd" * 32, "gw")


@on_both("clinic")
def test_the_database_itself_refuses_two_active_revisions(clinic: World) -> None:
    with reading(clinic.c.engine) as connection:
        row = dict(revisions.listing(connection, "clinic")[0])
    clinic.queue("clinic", "ping")
    with reading(clinic.c.engine) as connection:
        job_id = job_queue.listing(connection)[0]["job_id"]
    other = {**row, "revision_id": "rev-other", "revision": 9, "job_id": job_id}
    with pytest.raises(IntegrityError), writing(clinic.c.engine) as connection:
        connection.execute(insert(rows).values(other))


@on_both("clinic")
def test_revisions_only_go_forward(clinic: World) -> None:
    older = staged(clinic)
    newer = staged(clinic, b"SEALED " + b"cd" * 32)
    revisions.admit(clinic.c, newer["revision_id"], "cd" * 32, "gw")
    with pytest.raises(RevisionSuperseded):
        revisions.admit(clinic.c, older["revision_id"], NEW, "gw")
    assert clinic.revisions("clinic")[2] == "quarantined"


@on_both("clinic")
def test_a_deleted_adapter_that_is_handed_in_again_is_refused(clinic: World) -> None:
    old = clinic.silos["clinic"].last_digest or ""
    clinic.file("clinic")
    clinic.carry()
    again = staged(clinic, b"SEALED " + old.encode())
    assert again["expectation"]["tombstoned_digests"] == [old]
    with pytest.raises(AdapterTombstoned):
        revisions.admit(clinic.c, again["revision_id"], old, "gw")
    assert clinic.revisions("clinic") == {1: "destroyed", 2: "active", 3: "quarantined"}


@on_both("clinic")
def test_an_ordinary_retraining_buries_nothing(clinic: World) -> None:
    clinic.train("clinic")
    assert clinic.revisions("clinic") == {1: "destroyed", 2: "active"}
    assert clinic.count(tombstones) == 0


def test_an_adapter_other_than_the_attested_one_is_refused(clinic: World) -> None:
    request_id = clinic.file("clinic")
    clinic.driver.tick()
    clinic.work()
    one = clinic.gateways[0].listed(clinic.c, "staged")[0]
    with pytest.raises(AttestationMismatch):
        revisions.admit(clinic.c, one["revision_id"], NEW, "gw")
    clinic.driver.tick()
    assert (clinic.state(request_id), clinic.request(request_id)["code"]) == ("failed", "attestation_mismatch")
    assert clinic.permitted() == ()


@pytest.mark.parametrize("digest", ["", "AB" * 32, "ab" * 31, "zz" * 32, "sha256:" + "ab" * 32])
def test_a_digest_that_is_none_is_refused(clinic: World, digest: str) -> None:
    one = staged(clinic)
    with pytest.raises(DigestInvalid):
        revisions.admit(clinic.c, one["revision_id"], digest, "gw")


def test_a_refused_revision_keeps_the_reason_and_never_becomes_active(clinic: World) -> None:
    one = staged(clinic)
    revisions.quarantine(clinic.c, one["revision_id"], "not_finite", "a tensor is not finite", "gw")
    revisions.quarantine(clinic.c, one["revision_id"], "other", "said again", "gw")
    with reading(clinic.c.engine) as connection:
        assert revisions.get(connection, one["revision_id"])["code"] == "not_finite"
    with pytest.raises(IllegalTransition):
        revisions.admit(clinic.c, one["revision_id"], NEW, "gw")
    assert clinic.permitted() == ("clinic",)


def test_a_bundle_comes_back_as_it_was_handed_in(clinic: World) -> None:
    sealed = b"SEALED " + NEW.encode() + os.urandom(100_000)
    one = staged(clinic, sealed)
    assert revisions.bundle(clinic.c, one["revision_id"]) == sealed


def test_a_bundle_is_never_stored_unwrapped(clinic: World) -> None:
    canary = os.urandom(64)
    staged(clinic, b"SEALED " + NEW.encode() + canary)
    for path in clinic.settings.directory.rglob("*"):
        if path.is_file():
            assert canary not in path.read_bytes(), path


def test_a_bundle_changed_on_disk_or_taken_for_another_is_not_given_out(clinic: World) -> None:
    one, bundles = staged(clinic), clinic.settings.bundles
    path = bundles / f"{one['revision_id']}.sealed"
    blob = bytearray(path.read_bytes())
    blob[20] ^= 1
    path.write_bytes(blob)
    with pytest.raises(BundleCorrupt):
        revisions.bundle(clinic.c, one["revision_id"])
    active = clinic.gateways[0].listed(clinic.c, "active")[0]["revision_id"]
    shutil.copy(bundles / f"{active}.sealed", path)
    shutil.copy(clinic.settings.keystore / f"{active}.key", clinic.settings.keystore / f"{one['revision_id']}.key")
    with pytest.raises(BundleCorrupt):
        revisions.bundle(clinic.c, one["revision_id"])


def test_a_restored_backup_of_a_destroyed_revision_cannot_be_opened(clinic: World, tmp_path: Path) -> None:
    old = clinic.gateways[0].listed(clinic.c, "active")[0]["revision_id"]
    sealed = clinic.settings.bundles / f"{old}.sealed"
    backup = tmp_path / "backup"
    shutil.copy(sealed, backup)
    clinic.file("clinic")
    clinic.carry()
    assert not sealed.exists()
    shutil.copy(backup, sealed)
    with pytest.raises(BundleDestroyed):
        revisions.bundle(clinic.c, old)


def retired(world: World) -> dict[str, Any]:
    one = staged(world)
    revisions.admit(world.c, one["revision_id"], NEW, "gw")
    return world.gateways[0].listed(world.c, "retired")[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"revision_id": "rev-0"},
        {"silo_id": "bank"},
        {"adapter_digest": "ef" * 32},
        {"gateway_key_id": "0123456789abcdef"},
    ],
)
def test_a_purge_of_something_else_destroys_nothing(clinic: World, changes: dict[str, str]) -> None:
    one = retired(clinic)
    with pytest.raises(PurgeInvalid):
        purging.acknowledge_purge(clinic.c, one["revision_id"], clinic.gateways[0].acknowledge(one, **changes))
    assert clinic.revisions("clinic")[1] == "retired"


@on_both("clinic")
def test_a_purge_that_no_gateway_of_the_plan_signed_destroys_nothing(clinic: World) -> None:
    one = retired(clinic)
    impostor = Gateway(sealing=clinic.gateways[0].sealing, signing=SigningKey.generate())
    for forged in (impostor.acknowledge(one), Gateway().acknowledge(one), b"", b"{}", b"x" * 500_000):
        with pytest.raises(PurgeInvalid):
            purging.acknowledge_purge(clinic.c, one["revision_id"], forged)
    assert clinic.revisions("clinic")[1] == "retired"


def test_one_gateway_cannot_swear_for_another(world: World) -> None:
    honest, lazy = Gateway(), Gateway()
    world.add_plan(honest, lazy)
    world.add_silo("clinic")
    world.train("clinic")
    one = retired(world)
    claim = {name: one[name] for name in ("revision_id", "silo_id", "adapter_digest")}
    forged = PurgeAcknowledgement(
        **claim, gateway_key_id=lazy.key.key_id, library_version=1, purged_at="2026-01-01T00:00:00Z", where=("memory",)
    )
    with pytest.raises(PurgeInvalid):
        purging.acknowledge_purge(world.c, one["revision_id"], sign_purge(forged, honest.signing).to_json())
    assert purging.acknowledge_purge(world.c, one["revision_id"], honest.acknowledge(one)) == "retired"
    assert purging.acknowledge_purge(world.c, one["revision_id"], honest.acknowledge(one)) == "retired"
    assert purging.acknowledge_purge(world.c, one["revision_id"], lazy.acknowledge(one)) == "destroyed"
    assert purging.acknowledge_purge(world.c, one["revision_id"], lazy.acknowledge(one)) == "destroyed"


def test_what_is_in_use_cannot_be_purged_or_destroyed(clinic: World) -> None:
    active = clinic.gateways[0].listed(clinic.c, "active")[0]
    with pytest.raises(IllegalTransition):
        purging.acknowledge_purge(clinic.c, active["revision_id"], clinic.gateways[0].acknowledge(active))
    with pytest.raises(IllegalTransition):
        revisions.destroy(clinic.c, active["revision_id"], "test")
    assert revisions.bundle(clinic.c, active["revision_id"])


def test_an_unknown_revision_is_named(clinic: World) -> None:
    for act in (
        lambda: revisions.admit(clinic.c, "rev-0", NEW, "gw"),
        lambda: revisions.quarantine(clinic.c, "rev-0", "x", "x", "gw"),
        lambda: purging.acknowledge_purge(clinic.c, "rev-0", b""),
        lambda: revisions.bundle(clinic.c, "rev-0"),
    ):
        with pytest.raises(RevisionUnknown, match="rev-0"):
            act()
