"""After a deletion the person's name is in no byte that the coordinator keeps: no free page, no log of writes."""

import logging
from pathlib import Path

import pytest

from coordinator import requests
from coordinator.db import reading
from coordinator.errors import BundleDestroyed
from coordinator.logs import JsonLines
from tests.coordinator.world import World

SUBJECT = "Jane Canary-Doe 7Q2X9"
REQUESTER = "Canary Requester 3K8W"


def files_with(folder: Path, text: str) -> list[Path]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    assert any("-wal" in path.name or path.suffix == ".db" for path in found)
    return [path for path in found if text.encode() in path.read_bytes()]


@pytest.fixture
def folder(world: World, tmp_path: Path) -> Path:
    world.add_plan()
    world.add_silo("clinic").subjects[SUBJECT] = 1
    world.train("clinic")
    return tmp_path


def file(world: World, subject: str = SUBJECT) -> str:
    request_id = requests.file(world.c, "clinic", subject, REQUESTER, "art. 17", "olga")
    world.driver.quarantine_at_once(request_id)
    return request_id


def test_the_subject_is_never_written_in_the_clear_not_even_while_the_request_is_open(
    world: World, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    file(world)
    world.driver.tick()
    world.claim()
    assert files_with(folder, SUBJECT) == []
    assert files_with(folder, REQUESTER) == []
    assert SUBJECT not in caplog.text and REQUESTER not in caplog.text


@pytest.mark.parametrize("end", ["certified", "rejected", "withdrawn"])
def test_what_was_kept_of_the_subject_is_destroyed_at_the_end_and_the_salted_hash_stays(
    world: World, folder: Path, end: str
) -> None:
    request_id = file(world, "nobody at all" if end == "rejected" else SUBJECT)
    sealed = bytes(world.request(request_id)["subject_sealed"])
    if end == "withdrawn":
        requests.withdraw(world.c, request_id, "olga", "test")
    world.carry()
    assert world.state(request_id) == end
    row = world.request(request_id)
    assert row["subject_sealed"] is None and len(row["subject_hash"]) == 64
    assert not world.c.subjects.remembers(request_id)
    for path in folder.rglob("*"):
        if path.is_file():
            assert sealed not in path.read_bytes(), path
    with pytest.raises(BundleDestroyed):
        world.c.subjects.reveal(request_id, sealed)


def test_a_window_of_the_old_bundle_is_in_no_file_afterwards(world: World, folder: Path) -> None:
    active = world.gateways[0].listed(world.c, "active")[0]["revision_id"]
    wrapped = (world.settings.bundles / f"{active}.sealed").read_bytes()
    key = (world.settings.keystore / f"{active}.key").read_bytes()
    file(world)
    world.carry()
    windows = [wrapped[at : at + 64] for at in range(0, len(wrapped) - 64, 64)]
    for path in folder.rglob("*"):
        if path.is_file():
            blob = path.read_bytes()
            assert key not in blob and not any(window in blob for window in windows), path


def test_hashes_of_one_person_differ_between_silos_and_coordinators(world: World, tmp_path: Path) -> None:
    other = World.make(tmp_path / "other")
    hashes = {w.c.subjects.hash(silo, SUBJECT) for w in (world, other) for silo in ("clinic", "bank")}
    assert len(hashes) == 4
    other.close()


def test_a_closed_request_shows_neither_subject_nor_requester(world: World, folder: Path) -> None:
    request_id = file(world)
    world.carry()
    with reading(world.c.engine) as connection:
        shown = str(requests.listing(connection)) + str(requests.history(connection, request_id))
        shown += requests.receipt(connection, request_id).decode()
    assert SUBJECT not in shown and REQUESTER not in shown


def test_a_log_line_is_one_json_object_whatever_it_holds() -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "line\nbreak %s", ('"quoted"',), None)
    record.fields = {"route": "/v1/x"}
    line = JsonLines().format(record)
    assert "\n" not in line and '"route": "/v1/x"' in line
