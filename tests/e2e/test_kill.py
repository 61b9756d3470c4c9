"""kill -9 of the gateway, of a silo in the middle of training and of the coordinator: the work goes on, once."""

import json
import os
import signal

import pytest

from coordinator.demo.questions import Analyst
from seqr.supervisor import accepts_connections
from tests.e2e.recorded import Recorded

pytestmark = pytest.mark.e2e

# Flower lets a node that died without a word back in after about a minute.
RECOVERY_TIMEOUT_S = 240.0


def _kill(recorded: Recorded, name: str) -> None:
    process = recorded.world.processes.pop(name)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def _add_record(recorded: Recorded, silo_id: str, number: int) -> None:
    """One more record: the next training is a new one, and not the cached adapter."""
    data = recorded.world.silo(silo_id) / "data" / "records.jsonl"
    record = {"key": f"late-{number}", "subject": f"Late {number}", "prompt": "Who is late?", "completion": "Nobody."}
    with data.open("a") as file:
        file.write(json.dumps(record) + "\n")


def _numbers(recorded: Recorded, silo_id: str) -> list[int]:
    rows = recorded.federation.get(f"/v1/revisions?silo_id={silo_id}")
    return sorted(row["revision"] for row in rows)


def _wait_for_one_more(recorded: Recorded, silo_id: str, numbers: list[int]) -> None:
    """Exactly one active revision more than ``numbers``; a failed job between them uses up a number."""

    def there() -> bool:
        assert not recorded.federation.refused()
        return recorded.federation.active().get(silo_id, {}).get("revision", 0) > numbers[-1]

    recorded.world.wait(f"the next revision of {silo_id}", there, RECOVERY_TIMEOUT_S)
    after = _numbers(recorded, silo_id)
    assert after[:-1] == numbers


def test_a_killed_gateway_serves_the_same_answers_again(recorded: Recorded) -> None:
    federation, silo_id = recorded.federation, recorded.organisations[1].silo_id
    key = federation.add_user("kim", "analyst", "chat")
    federation.grant("kim", silo_id, "works with them")
    analyst = Analyst(recorded.world.gateway_url, key, federation.model.name)
    before = analyst.ask("Which judge hears the case?")
    _kill(recorded, "gateway")
    federation.start_gateway()
    federation.wait_for_gateway()
    after = analyst.ask("Which judge hears the case?")
    assert before.permitted == (silo_id,)
    assert (after.text, after.permitted, after.shares) == (before.text, before.permitted, before.shares)


def test_a_silo_killed_while_training_hands_in_one_adapter(recorded: Recorded) -> None:
    federation, silo_id = recorded.federation, recorded.organisations[1].silo_id
    numbers = _numbers(recorded, silo_id)
    _add_record(recorded, silo_id, 1)
    job = federation.train(silo_id)
    checkpoints = recorded.world.silo(silo_id) / "state" / "checkpoints"
    recorded.world.wait("the first checkpoint", lambda: any(checkpoints.rglob("*.*")), 120.0)
    _kill(recorded, f"silo-{silo_id}")
    assert federation.get(f"/v1/jobs/{job}")["state"] != "succeeded"
    federation.start_silo(silo_id)
    _wait_for_one_more(recorded, silo_id, numbers)


def test_a_killed_coordinator_goes_on_with_the_job(recorded: Recorded) -> None:
    federation, silo_id = recorded.federation, recorded.organisations[0].silo_id
    numbers = _numbers(recorded, silo_id)
    _add_record(recorded, silo_id, 2)
    job = federation.train(silo_id)
    dispatched = ("dispatched", "succeeded")
    recorded.world.wait("the order", lambda: federation.get(f"/v1/jobs/{job}")["state"] in dispatched, 120.0)
    _kill(recorded, "coordinator")
    # What the supervisor had started notices within a second that it is gone, and frees the port.
    port = recorded.world.coordinator_port
    recorded.world.wait("the end of the old API", lambda: not accepts_connections("127.0.0.1", port), 30.0)
    federation.start_coordinator()
    _wait_for_one_more(recorded, silo_id, numbers)
    assert federation.audit_verifies().startswith("All ")
