"""A federation in one process: a real coordinator and policy, silos and gateways that only sign and answer."""

import json
import secrets
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from sqlalchemy import Engine, event, select, update

from coordinator import enrolment, job_queue, plans, purging, requests, revisions
from coordinator.core import Coordinator, open_coordinator
from coordinator.db import now, reading, writing
from coordinator.driver import Driver
from coordinator.errors import Conflict
from coordinator.flower_nodes import SuperLinkUnreachable
from coordinator.jobs import DispatchedJob, JobReply, JobTable
from coordinator.models import deletion_requests
from coordinator.models import jobs as job_rows
from coordinator.models import revisions as revision_rows
from coordinator.reconcile import Reconciler, policy_status
from coordinator.settings import Settings, make_settings
from coordinator.setup import init_state
from policy.audit import entries
from policy.db import upgrade as upgrade_policy
from policy.keys import create_pepper, load_pepper
from policy.store import PolicyStore
from seqr import dsse
from seqr.canonical import canonical_json, sha256_hex
from seqr.document import utc_now, utc_text
from seqr.enrolment import EnrolmentClaim, sign_enrolment
from seqr.job import ErasureAttestation, JobOrder, sign_attestation, verify_job
from seqr.keys import SealingKey, SigningKey
from seqr.plan import GatewayKey, ModuleSpec, Plan, create_plan, sign_plan
from seqr.purge import PurgeAcknowledgement, sign_purge

HOW = {"actor": "ada", "reason": "test"}


def on_both(fixture: str) -> pytest.MarkDecorator:
    """Run the test twice: its ``world`` or ``clinic`` on SQLite, then on PostgreSQL."""
    return pytest.mark.parametrize(fixture, ["sqlite", "postgresql"], indirect=True)


class Nodes:
    """The SuperLink's list of keys; ``down`` makes it unreachable."""

    def __init__(self) -> None:
        self.keys: dict[str, str] = {}
        self.down = False

    def register(self, silo_id: str, node_key: str) -> None:
        self._require_up()
        self.keys[node_key] = silo_id

    def unregister(self, node_key: str) -> None:
        self._require_up()
        self.keys.pop(node_key, None)

    def _require_up(self) -> None:
        if self.down:
            raise SuperLinkUnreachable("down")


def node_key() -> str:
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def _without_waiting_for_the_disk(engine: Engine) -> None:
    """Tests kill processes, not machines: what was written is there without fsync."""
    if engine.dialect.name == "sqlite":
        engine.dispose()
        event.listen(engine, "connect", lambda connection, _record: connection.execute("PRAGMA synchronous = OFF"))


@dataclass
class Silo:
    """Keeps subjects -> records, and answers orders as silo_client does: the same order, the same reply."""

    silo_id: str
    subjects: dict[str, int] = field(default_factory=lambda: {"jane.doe": 3, "john.roe": 2, "max.moe": 1})
    key: SigningKey = field(default_factory=SigningKey.generate)
    node_key: str = field(default_factory=node_key)
    trained: int = 0
    last_digest: str | None = None
    removed: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    replies: dict[str, JobReply] = field(default_factory=dict)
    fail_with: str | None = None

    def copy(self) -> "Silo":
        return replace(self, subjects=dict(self.subjects), removed=dict(self.removed), replies=dict(self.replies))

    def asks(self, **changes: str) -> enrolment.Enrolment:
        claim = EnrolmentClaim(self.silo_id, "", self.key.public.to_b64(), self.node_key)
        proof = sign_enrolment(claim, self.key).to_json()
        return enrolment.Enrolment(**{**asdict(claim), **changes}, proof=proof)

    def root(self) -> str:
        return sha256_hex(canonical_json(self.subjects))

    def adapter_digest(self) -> str | None:
        """What training on the present records gives; nothing without records."""
        return sha256_hex(b"adapter " + self.root().encode()) if self.subjects else None

    def answer(self, job: DispatchedJob, coordinator: Coordinator) -> JobReply:
        envelope = dsse.Envelope.from_json(job.order_envelope)
        order = verify_job(envelope, coordinator.key.public)
        if order.nonce not in self.replies:
            self.replies[order.nonce] = self._do(order, job)
        return self.replies[order.nonce]

    def _do(self, order: JobOrder, job: DispatchedJob) -> JobReply:
        if order.kind == "ping":
            return JobReply("ok")
        attestation = None
        if order.kind == "erase":
            subject = order.subject or ""
            if subject not in self.subjects and subject not in self.removed:
                return JobReply("error", "subject_unknown", "no record is about this subject")
            if subject in self.subjects:
                self.removed[subject] = (self.root(), self.last_digest)
                del self.subjects[subject]
        if self.fail_with:
            code, self.fail_with = self.fail_with, None
            return JobReply("error", code, "the silo could not do it")
        self.trained += 1
        if order.kind == "erase":
            attestation = self.attest(order, job.plan_envelope)
        self.last_digest = self.adapter_digest()
        sealed = None if self.last_digest is None else b"SEALED " + self.last_digest.encode() + secrets.token_bytes(500)
        return JobReply("ok", sealed=sealed, attestation=attestation)

    def attest(self, order: JobOrder, plan_envelope: bytes, **changes: Any) -> bytes:
        plan = json.loads(dsse.Envelope.from_json(plan_envelope).payload)
        before, old = self.removed[order.subject or ""]
        claim = ErasureAttestation(
            request_id=order.request_id or "",
            silo_id=self.silo_id,
            plan_id=order.plan_id,
            removed_commitments=(sha256_hex(f"{self.silo_id} {order.subject}".encode()),),
            dataset_root_before=before,
            dataset_root_after=self.root(),
            records_removed=1,
            old_adapter_digest=old,
            new_adapter_digest=self.adapter_digest(),
            base_model_digest=plan["base_model_digest"],
            seed=plan["seed"],
            environment={},
            completed_at=utc_text(utc_now()),
        )
        return sign_attestation(replace(claim, **changes), self.key).to_json()


@dataclass
class Gateway:
    """Takes staged revisions in and swears retired ones away, over the functions the REST API calls."""

    sealing: SealingKey = field(default_factory=SealingKey.generate)
    signing: SigningKey = field(default_factory=SigningKey.generate)
    holds: dict[str, str] = field(default_factory=dict)
    refuse_with: str | None = None

    @property
    def key(self) -> GatewayKey:
        return GatewayKey.of(self.sealing.public, self.signing.public)

    def poll(self, c: Coordinator, purge: bool = True) -> None:
        for one in self.listed(c, "staged"):
            if self.refuse_with:
                revisions.quarantine(c, one["revision_id"], self.refuse_with, "intake refused it", "gw")
                continue
            digest = digest_in(revisions.bundle(c, one["revision_id"]))
            try:
                revisions.admit(c, one["revision_id"], digest, "gw")
            except Conflict:
                continue
        active = {one["revision_id"]: one["adapter_digest"] for one in self.listed(c, "active")}
        self.holds = active
        for one in self.listed(c, "retired") if purge else ():
            purging.acknowledge_purge(c, one["revision_id"], self.acknowledge(one))

    def listed(self, c: Coordinator, state: str) -> list[dict[str, Any]]:
        with reading(c.engine) as connection:
            return [one for one in revisions.for_gateways(connection) if one["state"] == state]

    def acknowledge(self, one: dict[str, Any], **changes: Any) -> bytes:
        claim = {
            "revision_id": one["revision_id"],
            "silo_id": one["silo_id"],
            "adapter_digest": one["adapter_digest"],
            "gateway_key_id": self.key.key_id,
            "library_version": 2,
            "purged_at": utc_text(utc_now()),
            "where": ("memory",),
        }
        return sign_purge(PurgeAcknowledgement(**{**claim, **changes}), self.signing).to_json()


def digest_in(bundle: bytes) -> str:
    return bundle[7:71].decode()


class World:
    """One coordinator with its policy, and helpers that play the other parts."""

    def __init__(self, settings: Settings, nodes: Nodes | None = None) -> None:
        self.settings = settings
        self.nodes = nodes or Nodes()
        self.c = open_coordinator(settings)
        for engine in (self.c.engine, self.c.policy_engine):
            _without_waiting_for_the_disk(engine)
        self.driver = Driver(self.c, Reconciler(self.c, self.nodes, retry_seconds=0))
        self.jobs = JobTable(self.c)
        self.silos: dict[str, Silo] = {}
        self.gateways: list[Gateway] = []

    @classmethod
    def make(cls, directory: Path, database_url: str = "", policy_database_url: str = "", **more: Any) -> "World":
        settings = make_settings(
            directory=directory,
            database_url=database_url,
            policy_database_url=policy_database_url,
            loop_seconds=0.05,
            **more,
        )
        init_state(settings, {})
        upgrade_policy(settings.policy_database_url)
        create_pepper(settings.policy_pepper_file)
        world = cls(settings)
        world.store.create_user("ada", ["admin"], **HOW)
        world.store.create_user("olga", ["privacy_officer"], **HOW)
        world.store.create_user("gw", ["service"], **HOW)
        world.store.create_user("ann", ["analyst"], **HOW)
        return world

    @classmethod
    def with_clinic(cls, directory: Path, database_url: str = "", policy_database_url: str = "") -> "World":
        """A plan, one gateway, and one silo, clinic, whose first revision is active and granted to ann."""
        world = cls.make(directory, database_url, policy_database_url)
        world.add_plan()
        world.add_silo("clinic")
        world.train("clinic")
        return world

    def copy(self, directory: Path) -> "World":
        """The same world (on SQLite in its directory) once more, to be changed independently."""
        self.close()
        shutil.copytree(self.settings.directory, directory)
        nodes = Nodes()
        nodes.keys.update(self.nodes.keys)
        twin = World(make_settings(directory=directory, loop_seconds=0.05), nodes)
        twin.silos = {silo_id: silo.copy() for silo_id, silo in self.silos.items()}
        twin.gateways = [replace(gateway, holds=dict(gateway.holds)) for gateway in self.gateways]
        return twin

    @property
    def store(self) -> PolicyStore:
        return PolicyStore(self.c.policy_engine, load_pepper(self.settings.policy_pepper_file))

    def key(self, user_id: str, *scopes: str, clock: Callable[[], datetime] = now, **more: Any) -> str:
        store = self.store
        store.clock = clock
        return store.create_key(user_id, scopes, **more, **HOW).secret

    def add_plan(self, *gateways: Gateway, seed: int = 1) -> Plan:
        self.gateways = list(gateways) or [Gateway()]
        plan = create_plan(
            federation="test",
            base_model="tiny",
            base_model_digest="sha256:" + "0" * 64,
            modules=[ModuleSpec("layer.q", 8, 8)],
            rank=2,
            alpha=4,
            seed=seed,
            gateway_keys=[gateway.key for gateway in self.gateways],
        )
        with writing(self.c.engine) as connection:
            plans.store(connection, sign_plan(plan, self.c.key).to_json(), self.c.key.public, "ada", "test")
        return plan

    def add_silo(self, silo_id: str) -> Silo:
        silo = self.silos[silo_id] = Silo(silo_id)
        enrolment.enrol(self.c.engine, silo.asks(), 100)
        enrolment.approve(self.c.engine, silo_id, silo.key.public.fingerprint, "ada", "test")
        self.driver.tick()
        self.store.add_grant("user:ann", silo_id, **HOW)
        return silo

    def train(self, silo_id: str) -> None:
        """One revision all the way to active."""
        self.queue(silo_id)
        self.work()
        self.poll()

    def queue(self, silo_id: str, kind: str = "train") -> str:
        with writing(self.c.engine) as connection:
            return job_queue.enqueue(connection, silo_id, kind, "ada", "test")

    def claim(self, *online: str) -> list[DispatchedJob]:
        return self.jobs.claim_next(set(online) or set(self.silos))

    def work(self, *online: str) -> list[str]:
        """The ServerApp and the silos for one round."""
        return [
            self.jobs.complete(job.job_id, self.silos[job.silo_id].answer(job, self.c)) for job in self.claim(*online)
        ]

    def poll(self) -> None:
        for gateway in self.gateways:
            gateway.poll(self.c)

    def file(self, silo_id: str, subject: str = "jane.doe") -> str:
        request_id = requests.file(self.c, silo_id, subject, "the person", "art. 17", "olga")
        self.driver.quarantine_at_once(request_id)
        return request_id

    def carry(self, rounds: int = 6) -> None:
        """Let everybody do their part for a while."""
        for _ in range(rounds):
            before = self.snapshot()
            self.driver.tick()
            self.work()
            self.driver.tick()
            self.poll()
            if self.snapshot() == before:
                break
        self.driver.tick()

    def snapshot(self) -> list[Any]:
        with reading(self.c.engine) as connection:
            moving = (deletion_requests.c.state, revision_rows.c.state, job_rows.c.state)
            return [connection.execute(select(column)).scalars().all() for column in moving]

    def request(self, request_id: str) -> dict[str, Any]:
        with reading(self.c.engine) as connection:
            return dict(requests.get(connection, request_id))

    def state(self, request_id: str) -> str:
        return str(self.request(request_id)["state"])

    def history(self, request_id: str) -> list[str]:
        with reading(self.c.engine) as connection:
            return [event["to_state"] for event in requests.history(connection, request_id)]

    def revisions(self, silo_id: str) -> dict[int, str]:
        with reading(self.c.engine) as connection:
            return {row["revision"]: row["state"] for row in revisions.listing(connection, silo_id)}

    def policy_status(self, silo_id: str) -> str:
        return policy_status(self.c, silo_id)

    def permitted(self, user_id: str = "ann") -> tuple[str, ...]:
        return self.c.reader.permitted(user_id, now()).silos

    def audit(self, prefix: str = "") -> list[dict[str, Any]]:
        with self.c.policy_engine.connect() as connection:
            rows = [{"action": row.action, **row.detail} for row in entries(connection)]
        return [row for row in rows if row["action"].startswith(prefix)]

    def backdate(self, request_id: str, days: float) -> None:
        with writing(self.c.engine) as connection:
            row = requests.get(connection, request_id)
            connection.execute(
                deletion_requests.update()
                .where(deletion_requests.c.request_id == request_id)
                .values(
                    received_at=row["received_at"] - timedelta(days=days), due_at=row["due_at"] - timedelta(days=days)
                )
            )

    def let_wait(self, silo_id: str) -> None:
        """Make the silo's queued job an old one."""
        with writing(self.c.engine) as connection:
            waiting = update(job_rows).where(job_rows.c.silo_id == silo_id, job_rows.c.state == "queued")
            connection.execute(waiting.values(queued_at=now() - timedelta(hours=1)))

    def count(self, table: Any) -> int:
        with reading(self.c.engine) as connection:
            return len(connection.execute(select(table)).all())

    def reopen(self) -> "World":
        """A coordinator that starts anew over the same state."""
        again = World(self.settings, self.nodes)
        again.silos, again.gateways = self.silos, self.gateways
        return again

    def close(self) -> None:
        self.c.close()
