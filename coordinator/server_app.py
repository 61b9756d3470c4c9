"""The resident Flower ServerApp: carries orders from the job table to the silos, and their replies back.

It decides nothing: which job is next, and what a reply is worth, is the job table's. An order is sent again whenever
its answer may have been lost, which is safe because silos answer the same order with the same reply.
"""

import fcntl
import io
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import httpx
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from numpy.lib import format as npy

from coordinator.errors import CoordinatorError
from coordinator.flower_nodes import canonical_node_key
from coordinator.flower_process import LOCK_NAME
from coordinator.jobs import DispatchedJob, JobReply

if TYPE_CHECKING:
    from flwr.proto.node_pb2 import NodeInfo

DIRECTORY = "SEQR_COORDINATOR_DIRECTORY"
STEP_S = 1.0
# The message outlives any training; an order's own expiry is what ends it.
MESSAGE_TTL_S = 7 * 24 * 3600.0
# The reply to an order that never reached the silo, or whose answer can no longer come.
LOST = frozenset(
    {
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        ErrorCode.NODE_UNAVAILABLE,
        ErrorCode.CLIENT_APP_CRASHED,
    }
)

logger = logging.getLogger(__name__)
app = ServerApp()


class ServerAppRunning(CoordinatorError):
    code = "server_app_running"
    status = 500


class Jobs(Protocol):
    """What the dispatcher needs of ``coordinator.jobs.JobTable``."""

    def claim_next(self, online_silos: set[str]) -> list[DispatchedJob]: ...
    def requeue(self, job_id: str, why: str) -> None: ...
    def requeue_all_dispatched(self) -> int: ...
    def requeue_expired(self) -> None: ...
    def complete(self, job_id: str, reply: JobReply) -> str: ...


class NodeKeys(Protocol):
    """Maps the canonical node key of every silo that may work now to its silo id."""

    def __call__(self) -> Mapping[str, str]: ...


@dataclass(frozen=True)
class _Sent:
    job: DispatchedJob
    node_id: int
    activated_at: str


class Dispatcher:
    """One step at a time: notice lost nodes, take replies, send what is queued for the silos that are connected."""

    def __init__(self, grid: Grid, jobs: Jobs, node_keys: NodeKeys, max_sealed_bytes: int) -> None:
        self._grid = grid
        self._jobs = jobs
        self._node_keys = node_keys
        self._max_sealed_bytes = max_sealed_bytes
        self._sent: dict[str, _Sent] = {}

    def start(self) -> None:
        """To be called once: whatever an earlier ServerApp had sent is lost to this one."""
        self._jobs.requeue_all_dispatched()

    def step(self) -> None:
        """Do everything that can be done now."""
        nodes = self._online()
        self._give_up_lost(nodes)
        self._take_replies()
        self._jobs.requeue_expired()
        busy = {sent.job.silo_id for sent in self._sent.values()}
        for job in self._jobs.claim_next(set(nodes) - busy):
            self._send(job, nodes[job.silo_id])

    def _online(self) -> "dict[str, NodeInfo]":
        silo_of = {canonical_node_key(key): silo_id for key, silo_id in self._node_keys().items()}
        online: dict[str, NodeInfo] = {}
        for node in self._grid.get_nodes():
            silo_id = silo_of.get(canonical_node_key(node.public_key))
            # While a key is being rotated two nodes may speak for one silo: the later one does.
            if silo_id is not None and _activated(node) > _activated(online.get(silo_id)):
                online[silo_id] = node
        return online

    def _give_up_lost(self, nodes: "Mapping[str, NodeInfo]") -> None:
        for message_id, sent in list(self._sent.items()):
            node = nodes.get(sent.job.silo_id)
            if node is not None and (node.node_id, node.last_activated_at) == (sent.node_id, sent.activated_at):
                continue
            # A node that went away, even if it is back, holds no message of before: it keeps them in memory.
            del self._sent[message_id]
            logger.info("%s is queued again: silo %s lost its connection", sent.job.job_id, sent.job.silo_id)
            self._jobs.requeue(sent.job.job_id, "the silo lost its connection")

    def _send(self, job: DispatchedJob, node: "NodeInfo") -> None:
        order = ConfigRecord({"envelope": job.order_envelope, "plan": job.plan_envelope})
        message = Message(
            content=RecordDict({"order": order}), dst_node_id=node.node_id, message_type="train.job", ttl=MESSAGE_TTL_S
        )
        sent = next(iter(self._grid.push_messages([message])), None)
        if not sent:
            self._jobs.requeue(job.job_id, "the order could not be sent")
            return
        self._sent[sent] = _Sent(job, node.node_id, node.last_activated_at)
        logger.info("%s sent to silo %s", job.job_id, job.silo_id)

    def _take_replies(self) -> None:
        # One by one: a reply that cannot be read must not hold up those of other silos.
        for message_id, sent in list(self._sent.items()):
            try:
                messages = list(self._grid.pull_messages([message_id]))
            except httpx.HTTPError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever Flower makes of records that a silo has crafted
                logger.warning("the reply of silo %s cannot be read: %s", sent.job.silo_id, type(error).__name__)
                del self._sent[message_id]
                self._jobs.complete(sent.job.job_id, _malformed("Flower cannot read it"))
                continue
            for message in messages:
                del self._sent[message_id]
                if message.has_error():
                    self._take_failure(sent, message.error.code)
                else:
                    self._jobs.complete(sent.job.job_id, unpack_reply(message.content, self._max_sealed_bytes))

    def _take_failure(self, sent: _Sent, code: int) -> None:
        logger.info("%s: Flower reports code %d instead of an answer", sent.job.job_id, code)
        if code in LOST:
            self._jobs.requeue(sent.job.job_id, f"no answer came from the silo (Flower code {code})")
            return
        failed = JobReply("error", "silo_app_failed", f"the silo's app could not be run (Flower code {code})")
        self._jobs.complete(sent.job.job_id, failed)


def unpack_reply(content: RecordDict, max_sealed_bytes: int) -> JobReply:
    """A silo's reply out of its records; one that is not of the agreed form becomes an error reply."""
    outcome = content.get("reply")
    if not isinstance(outcome, ConfigRecord):
        return _malformed("it has no outcome")
    status, code, message = (outcome.get(name, "") for name in ("status", "code", "message"))
    attestation = outcome.get("attestation")
    if not isinstance(status, str) or not isinstance(code, str) or not isinstance(message, str):
        return _malformed("its outcome is not text")
    if attestation is not None and not isinstance(attestation, bytes):
        return _malformed("its attestation is not bytes")
    bundle = content.get("bundle")
    if bundle is None:
        return JobReply(status, code, message, attestation=attestation)
    sealed = bundle.get("sealed") if isinstance(bundle, ArrayRecord) else None
    if not isinstance(sealed, Array):
        return _malformed("its bundle is not an array")
    # What an Array declares is not what it holds, and NumPy would allocate whatever its header asks for.
    data = sealed.data
    if len(data) > max_sealed_bytes + 4096:
        return JobReply("error", "bundle_too_large", f"the sealed adapter has {len(data)} bytes, too many")
    stream = io.BytesIO(data)
    try:
        if npy.read_magic(stream) != (1, 0):
            return _malformed("its bundle has an unknown form")
        shape, _, dtype = npy.read_array_header_1_0(stream)
    except ValueError:
        return _malformed("its bundle cannot be read")
    if dtype != np.uint8 or shape != (len(data) - stream.tell(),):
        return _malformed("its bundle is not a row of bytes")
    return JobReply(status, code, message, sealed=data[stream.tell() :], attestation=attestation)


def _malformed(what: str) -> JobReply:
    return JobReply("error", "reply_malformed", f"the silo's reply was malformed: {what}")


def _activated(node: "NodeInfo | None") -> float:
    if node is None:
        return float("-inf")
    return datetime.fromisoformat(node.last_activated_at).timestamp() if node.last_activated_at else 0.0


@contextmanager
def hold_lock(path: Path, wait_s: float = 30.0) -> Iterator[None]:
    """Hold the lock that says a ServerApp is alive; the kernel frees it however the process ends.

    Raises ServerAppRunning when another one holds it for longer than ``wait_s``.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    deadline = time.monotonic() + wait_s
    # Neither opening nor waiting touches the file's time: the launcher would take that for a ServerApp that died. Waits
    # are short because the launcher's own look at the lock may be what is in the way.
    with open(path, "a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ServerAppRunning("another resident ServerApp works for this coordinator") from None
                time.sleep(0.05)
        os.utime(path)
        yield


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Serve jobs for as long as the run lives."""
    from coordinator.core import open_coordinator
    from coordinator.jobs import JobTable
    from coordinator.logs import configure_logging
    from coordinator.settings import load_settings
    from coordinator.silos import approved_nodes

    configure_logging()
    settings = load_settings(os.environ[DIRECTORY])
    alive = settings.directory / "flower" / LOCK_NAME
    with hold_lock(alive):
        coordinator = open_coordinator(settings)

        dispatcher = Dispatcher(
            grid, JobTable(coordinator), lambda: approved_nodes(coordinator.engine), settings.max_bundle_bytes
        )
        dispatcher.start()
        while True:
            dispatcher.step()
            # The launcher takes a lock that has not been touched for a while for a ServerApp that hangs.
            os.utime(alive)
            time.sleep(STEP_S)
