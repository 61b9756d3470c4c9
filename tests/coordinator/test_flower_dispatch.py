"""The resident ServerApp: a job goes to its own silo, is answered once, and is sent again when its answer is lost."""

import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.task_identity import TaskIdentity

from coordinator.flower_nodes import canonical_node_key
from coordinator.jobs import DispatchedJob, JobReply
from coordinator.server_app import Dispatcher, ServerAppRunning, hold_lock, unpack_reply
from silo_client.client_app import BUNDLE_LIMIT_BYTES, pack_reply

LIMIT = 1000


@pytest.fixture(autouse=True)
def task_identity() -> Iterator[None]:
    """Flower's own processes set this before an app is called."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    yield
    TaskIdentity._run_id = TaskIdentity._task_id = TaskIdentity._node_id = None


def make_key() -> tuple[bytes, str]:
    public = ec.generate_private_key(ec.SECP384R1()).public_key()
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return pem, public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


@dataclass
class FakeGrid:
    """Stands for the SuperLink: nodes that are online, messages that were pushed, replies that wait."""

    nodes: dict[int, NodeInfo] = field(default_factory=dict)
    pushed: list[Message] = field(default_factory=list)
    replies: dict[str, Message | Exception] = field(default_factory=dict)
    accept: bool = True

    def get_nodes(self) -> Iterable[NodeInfo]:
        return list(self.nodes.values())

    def push_messages(self, messages: Iterable[Message]) -> list[str | None]:
        ids: list[str | None] = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"m{len(self.pushed)}"
            self.pushed.append(message)
            ids.append(message.metadata.message_id if self.accept else None)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        found = [self.replies.pop(message_id) for message_id in message_ids if message_id in self.replies]
        for reply in found:
            if isinstance(reply, Exception):
                raise reply
        return found  # type: ignore[return-value]

    def answer(self, number: int, content: RecordDict | Error | Exception) -> None:
        asked = self.pushed[number]
        self.replies[asked.metadata.message_id] = (
            content if isinstance(content, Exception) else Message(content, reply_to=asked)
        )


@dataclass
class FakeJobs:
    """A job table in memory with the interface of ``coordinator.jobs.JobTable``."""

    queued: list[str] = field(default_factory=list)
    dispatched: list[str] = field(default_factory=list)
    done: list[tuple[str, JobReply]] = field(default_factory=list)
    requeued: list[tuple[str, str]] = field(default_factory=list)

    def claim_next(self, online_silos: set[str]) -> list[DispatchedJob]:
        claimed = [job for job in self.queued if job.split("/")[0] in online_silos]
        self.queued = [job for job in self.queued if job not in claimed]
        self.dispatched += claimed
        return [DispatchedJob(job, job.split("/")[0], f"order {job}".encode(), b"plan") for job in claimed]

    def requeue(self, job_id: str, why: str) -> None:
        self.dispatched.remove(job_id)
        self.queued.append(job_id)
        self.requeued.append((job_id, why))

    def requeue_all_dispatched(self) -> int:
        count, self.queued, self.dispatched = len(self.dispatched), self.queued + self.dispatched, []
        return count

    def requeue_expired(self) -> None:
        return

    def complete(self, job_id: str, reply: JobReply) -> str:
        self.done.append((job_id, reply))
        self.dispatched.remove(job_id)
        return "succeeded"


class World:
    def __init__(self) -> None:
        self.grid, self.jobs, self.keys = FakeGrid(), FakeJobs(), {}
        self.dispatcher = Dispatcher(self.grid, self.jobs, lambda: self.keys, LIMIT)  # type: ignore[arg-type]

    def online(self, silo_id: str, node_id: int, since: int = 0) -> None:
        pem, openssh = make_key()
        self.keys[openssh] = silo_id
        self.grid.nodes[node_id] = NodeInfo(node_id=node_id, public_key=pem, last_activated_at=stamp(since))

    def back(self, node_id: int, since: int) -> None:
        self.grid.nodes[node_id].last_activated_at = stamp(since)


def stamp(second: int) -> str:
    return f"2026-01-01T00:00:{second:02d}+00:00"


@pytest.fixture
def world() -> World:
    return World()


def ok(sealed: bytes = b"sealed") -> RecordDict:
    return pack_reply(SimpleNamespace(status="ok", code="", message="", attestation=None, bundle=sealed))  # type: ignore[arg-type]


def test_a_job_goes_to_its_silo_alone_and_is_completed_once(world: World) -> None:
    world.online("alpha", 11)
    world.online("beta", 22)
    world.jobs.queued = ["beta/1"]
    world.dispatcher.step()
    (message,) = world.grid.pushed
    assert (message.metadata.dst_node_id, message.metadata.message_type) == (22, "train.job")
    assert dict(message.content["order"]) == {"envelope": b"order beta/1", "plan": b"plan"}
    world.grid.answer(0, ok())
    world.dispatcher.step()
    world.dispatcher.step()
    assert world.jobs.done == [("beta/1", JobReply("ok", sealed=b"sealed"))]


def test_a_job_of_an_absent_silo_waits(world: World) -> None:
    world.online("alpha", 11)
    world.jobs.queued = ["beta/1"]
    world.dispatcher.step()
    assert world.grid.pushed == [] and world.jobs.queued == ["beta/1"]
    world.online("beta", 22)
    world.dispatcher.step()
    assert [m.metadata.dst_node_id for m in world.grid.pushed] == [22]


def test_a_node_whose_key_is_nobodys_gets_nothing(world: World) -> None:
    world.online("alpha", 11)
    world.keys.clear()
    world.jobs.queued = ["alpha/1"]
    world.dispatcher.step()
    assert world.grid.pushed == []


def test_a_busy_silo_gets_its_next_job_after_the_first(world: World) -> None:
    world.online("alpha", 11)
    world.jobs.queued = ["alpha/1"]
    world.dispatcher.step()
    world.jobs.queued = ["alpha/2"]
    world.dispatcher.step()
    assert len(world.grid.pushed) == 1
    world.grid.answer(0, ok())
    world.dispatcher.step()
    assert len(world.grid.pushed) == 2


def test_job_of_a_node_that_went_away_is_queued_again(world: World) -> None:
    world.online("alpha", 11)
    world.jobs.queued = ["alpha/1"]
    world.dispatcher.step()
    node = world.grid.nodes.pop(11)
    world.dispatcher.step()
    assert world.jobs.requeued == [("alpha/1", "the silo lost its connection")]
    world.grid.nodes[11] = node
    world.dispatcher.step()
    assert len(world.grid.pushed) == 2


def test_job_of_a_node_that_restarted_between_two_looks_is_sent_again(world: World) -> None:
    world.online("alpha", 11, since=1)
    world.jobs.queued = ["alpha/1"]
    world.dispatcher.step()
    world.back(11, since=2)
    world.dispatcher.step()
    assert len(world.grid.pushed) == 2
    assert world.grid.pushed[0].content["order"] == world.grid.pushed[1].content["order"]
    world.grid.answer(0, ok(b"late"))
    world.grid.answer(1, ok())
    world.dispatcher.step()
    assert [reply.sealed for _, reply in world.jobs.done] == [b"sealed"]


def test_job_of_a_suspended_silo_is_taken_back(world: World) -> None:
    world.online("alpha", 11)
    world.jobs.queued = ["alpha/1"]
    world.dispatcher.step()
    world.keys.clear()
    world.dispatcher.step()
    assert world.jobs.queued == ["alpha/1"]


def test_the_later_connection_speaks_for_a_silo_with_two_keys(world: World) -> None:
    world.online("alpha", 11, since=5)
    world.online("alpha", 12, since=9)
    world.online("alpha", 13, since=7)
    world.jobs.queued = ["alpha/1"]
    world.dispatcher.step()
    assert [m.metadata.dst_node_id for m in world.grid.pushed] == [12]


@pytest.mark.parametrize(
    "code",
    [
        ErrorCode.NODE_UNAVAILABLE,
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        ErrorCode.CLIENT_APP_CRASHED,
    ],
)
def test_a_lost_answer_is_asked_for_again(world: World, code: int) -> None:
    world.online("alpha", 11)
    world.jobs.queued = ["alpha/1"]
    world.dispatcher.step()
    world.grid.answer(0, Error(code, "secret path /home/owner"))
    world.dispatcher.step()
    assert world.jobs.requeued == [("alpha/1", f"no answer came from the silo (Flower code {code})")]
    assert len(world.grid.pushed) == 2


def test_a_silo_app_that_cannot_run_fails_the_job_without_its_reason(world: World) -> None:
    world.online("alpha", 11)
    world.jobs.queued = ["alpha/1"]
    world.dispatcher.step()
    world.grid.answer(0, Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "record of Jane Doe"))
    world.dispatcher.step()
    ((_, reply),) = world.jobs.done
    assert (reply.status, reply.code) == ("error", "silo_app_failed") and "Jane" not in reply.message


def test_an_order_that_could_not_be_pushed_is_queued_again(world: World) -> None:
    world.online("alpha", 11)
    world.jobs.queued = ["alpha/1"]
    world.grid.accept = False
    world.dispatcher.step()
    assert world.jobs.queued == ["alpha/1"]


def test_a_new_server_app_sends_again_what_the_last_one_had_sent(world: World) -> None:
    world.online("alpha", 11)
    world.jobs.dispatched = ["alpha/1"]
    world.dispatcher.start()
    world.dispatcher.step()
    assert len(world.grid.pushed) == 1


def test_records_that_flower_cannot_read_fail_one_job_and_hold_up_no_other(world: World) -> None:
    world.online("alpha", 11)
    world.online("beta", 22)
    world.jobs.queued = ["alpha/1", "beta/1"]
    world.dispatcher.step()
    world.grid.answer(0, ValueError("crafted"))
    world.grid.answer(1, ok())
    world.dispatcher.step()
    assert [(job, reply.code) for job, reply in world.jobs.done] == [("alpha/1", "reply_malformed"), ("beta/1", "")]


def test_a_superlink_that_is_gone_ends_the_server_app(world: World) -> None:
    world.online("alpha", 11)
    world.jobs.queued = ["alpha/1"]
    world.dispatcher.step()
    world.grid.answer(0, httpx.ConnectError("gone"))
    with pytest.raises(httpx.ConnectError):
        world.dispatcher.step()
    assert world.jobs.dispatched == ["alpha/1"]


def npy(array: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def bundle(data: bytes) -> RecordDict:
    array = Array(dtype="uint8", shape=(1,), stype="numpy.ndarray", data=data)
    outcome = ConfigRecord({"status": "ok", "code": "", "message": ""})
    return RecordDict({"reply": outcome, "bundle": ArrayRecord({"sealed": array})})


HUGE = npy(np.zeros(1, np.uint8)).replace(b"(1,), }" + b" " * 11, b"(1000000000000,), }")


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (RecordDict({}), "reply_malformed"),
        (RecordDict({"reply": ArrayRecord()}), "reply_malformed"),
        (RecordDict({"reply": ConfigRecord({"status": 1, "code": "", "message": ""})}), "reply_malformed"),
        (
            RecordDict({"reply": ConfigRecord({"status": "ok", "code": "", "message": "", "attestation": "x"})}),
            "reply_malformed",
        ),
        (
            RecordDict({"reply": ConfigRecord({"status": "ok"}), "bundle": ConfigRecord({"sealed": b"x"})}),
            "reply_malformed",
        ),
        (bundle(b"not an array"), "reply_malformed"),
        (bundle(npy(np.zeros(4, np.float32))), "reply_malformed"),
        (bundle(npy(np.zeros((2, 2), np.uint8))), "reply_malformed"),
        (bundle(npy(np.zeros(4, np.uint8)) + b"trailing"), "reply_malformed"),
        (bundle(HUGE), "reply_malformed"),
        (bundle(npy(np.zeros(LIMIT + 5000, np.uint8))), "bundle_too_large"),
    ],
)
def test_a_reply_of_another_form_is_an_error_by_name(content: RecordDict, code: str) -> None:
    reply = unpack_reply(content, LIMIT)
    assert (reply.status, reply.code, reply.sealed) == ("error", code, None)


def test_the_header_that_claims_a_terabyte_is_really_in_the_test() -> None:
    with pytest.raises((MemoryError, ValueError)):
        np.load(io.BytesIO(HUGE))


@pytest.mark.parametrize("sealed", [None, b"x", bytes(range(256)) * 3])
@pytest.mark.parametrize("attestation", [None, b"{}"])
def test_what_a_silo_packs_the_coordinator_unpacks(sealed: bytes | None, attestation: bytes | None) -> None:
    sent: Any = SimpleNamespace(status="ok", code="c", message="m", attestation=attestation, bundle=sealed)
    assert unpack_reply(pack_reply(sent), LIMIT) == JobReply("ok", "c", "m", sealed, attestation)


def test_a_silo_does_not_send_a_bundle_over_the_limit() -> None:
    class Large(bytes):
        def __len__(self) -> int:
            return BUNDLE_LIMIT_BYTES + 1

    sent: Any = SimpleNamespace(status="ok", code="", message="", attestation=None, bundle=Large(b"x"))
    records = pack_reply(sent)
    assert records["reply"]["code"] == "bundle_too_large" and "bundle" not in records


def test_a_node_key_is_the_same_in_every_form() -> None:
    pem, openssh = make_key()
    assert canonical_node_key(pem) == canonical_node_key(openssh + " comment") == openssh


def test_two_server_apps_never_work_at_once_and_one_that_waits_does_not_look_alive(tmp_path: Path) -> None:
    lock = tmp_path / "flower" / "serverapp.lock"
    with hold_lock(lock):
        os.utime(lock, (1, 1))
        with pytest.raises(ServerAppRunning), hold_lock(lock, wait_s=0.2):
            pytest.fail("the second one got the lock")
        assert lock.stat().st_mtime == 1
    with hold_lock(lock):
        assert lock.stat().st_mtime > 1
