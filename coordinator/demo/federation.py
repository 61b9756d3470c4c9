"""A whole federation on loopback, built with the commands its four kinds of people would type."""

import json
import re
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from coordinator.demo.organisations import Organisation
from coordinator.demo.questions import STREAMS
from coordinator.demo.world import LOOPBACK, CommandFailed, World
from seqr.files import write_private

START_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class PlanChoice:
    """What the demo's plan says about adapters and training."""

    targets: str = "all"
    rank: int = 16
    alpha: float = 32.0
    max_steps: int = 40
    batch_size: int = 8
    learning_rate: float = 3e-3
    max_length: int = 256
    warmup_steps: int = 4
    dtype: str = "bfloat16"


class Federation:
    """Coordinator, gateway and silos of one demo."""

    def __init__(self, world: World, model: Path, plan: PlanChoice):
        self.world = world
        self.model = model
        self.plan_choice = plan
        self._database = ("--database", f"sqlite:///{world.coordinator / 'policy.db'}")
        self._pepper = ("--pepper-file", str(world.coordinator / "policy.pepper"))
        self.coordinator_key = ""
        self.admin_key = ""
        self._client: httpx.Client | None = None

    @property
    def ca_file(self) -> Path:
        """The certificate authority that silos and gateway trust."""
        return self.world.coordinator / "certs" / "ca.crt"

    def initialise(self) -> None:
        """Keys, certificates, databases, the gateway's public key and the signed plan."""
        world, coordinator = self.world, str(self.world.coordinator)
        world.seqr(
            *("coordinator", "init", "--dir", coordinator, "--federation", "demo"),
            *("--port", str(world.coordinator_port), "--superlink-port", str(world.superlink_port)),
        )
        world.seqr("coordinator", "certs", "--dir", coordinator)
        self.coordinator_key = (world.coordinator / "coordinator.pub").read_text().strip()
        made = world.seqr_json("policy", "init", "--admin", "ada", *self._database, *self._pepper)
        self.admin_key = made["key"]
        self.policy("user", "create", "gateway-1", "--role", "service", "--reason", "the gateway's own account")
        self._write_key(self.world.gateway / "coordinator-api.key", self.new_key("gateway-1", "gateway"))
        world.seqr(
            *("gateway", "init", "--dir", str(world.gateway), "--coordinator-url", world.coordinator_url),
            *("--coordinator-key", self.coordinator_key, "--coordinator-ca-file", str(self.ca_file)),
            *("--policy-database", self._database[1], "--policy-pepper-file", self._pepper[1]),
            *("--base-model", str(self.model), "--port", str(world.gateway_port)),
        )
        choice = self.plan_choice
        world.seqr(
            *("coordinator", "plan", "create", "--dir", coordinator, "--base-model", str(self.model)),
            *("--targets", choice.targets, "--rank", str(choice.rank), "--alpha", str(choice.alpha), "--seed", "7"),
            *("--dtype", choice.dtype, "--gateway-key", str(world.gateway / "gateway-key.json")),
            *("--max-steps", str(choice.max_steps), "--batch-size", str(choice.batch_size)),
            *("--learning-rate", str(choice.learning_rate), "--max-length", str(choice.max_length)),
            *("--warmup-steps", str(choice.warmup_steps)),
        )

    def start_services(self) -> None:
        """Coordinator with its Flower processes, and the gateway, which need not be ready before there are adapters."""
        self.start_coordinator()
        self.start_gateway()

    def start_coordinator(self) -> None:
        """``seqr coordinator up``: REST API, deletion loop, SuperLink, SuperExec and the resident ServerApp."""
        self.world.start("coordinator", "coordinator", "up", "--dir", str(self.world.coordinator))
        self.world.wait("the coordinator's start", lambda: self._answers(self.api, "/readyz"), START_TIMEOUT_S)

    def start_gateway(self) -> None:
        """``seqr gateway serve``; ``wait_for_gateway`` says when it is ready."""
        # The last one waits for the first to end, on a busy machine longer than a queue usually lets it.
        places = {"SEQR_GATEWAY_MAX_CONCURRENT": str(STREAMS), "SEQR_GATEWAY_QUEUE_TIMEOUT_SECONDS": "600"}
        self.world.start("gateway", "gateway", "serve", "--dir", str(self.world.gateway), environment=places)

    def wait_for_gateway(self) -> None:
        """Until every active revision is loaded."""
        gateway = httpx.Client(base_url=self.world.gateway_url)
        self.world.wait("the gateway's start", lambda: self._answers(gateway, "/readyz"), START_TIMEOUT_S)

    @property
    def api(self) -> httpx.Client:
        """The coordinator's REST API with the admin's key."""
        if self._client is None:
            self._client = self.client(self.admin_key)
        return self._client

    def client(self, key: str) -> httpx.Client:
        """The coordinator's REST API with anybody's key."""
        return httpx.Client(
            base_url=self.world.coordinator_url,
            headers={"Authorization": f"Bearer {key}"},
            verify=ssl.create_default_context(cafile=str(self.ca_file)),
            timeout=30.0,
        )

    def enrol(
        self, organisation: Organisation, *, superlink: str | None = None, coordinator_url: str | None = None
    ) -> str:
        """The owner writes the data file, makes a silo beside it and asks to join; returns its fingerprint."""
        folder = self.world.silo(organisation.silo_id)
        data = folder / "data" / "records.jsonl"
        data.parent.mkdir(parents=True, mode=0o700)
        data.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in organisation.records))
        self.world.seqr(
            *("silo", "init", str(folder), "--silo-id", organisation.silo_id),
            *("--display-name", organisation.display_name, "--data", str(data)),
            *("--subject-column", "subject", "--key-column", "key", "--base-model", str(self.model)),
            # Silos of one machine train side by side: with more threads each they only wait for one another.
            *("--threads", "1"),
            *("--coordinator-url", coordinator_url or self.world.coordinator_url),
            *("--coordinator-key", self.coordinator_key, "--ca-file", str(self.ca_file)),
            *("--superlink", superlink or f"{LOOPBACK}:{self.world.superlink_port}"),
        )
        said = self.world.seqr("silo", "enrol", "--dir", str(folder))
        found = re.search(r"SHA256:[A-Za-z0-9+/]{43}", said)
        if found is None:
            raise CommandFailed(f"'seqr silo enrol' printed no fingerprint: {said.strip()}")
        return found.group()

    def approve(self, silo_id: str, fingerprint: str) -> None:
        """The admin compares the fingerprint the owner read out, and lets the silo in."""
        self.post(f"/v1/silos/{silo_id}/approve", fingerprint=fingerprint, reason="fingerprint compared by phone")

    def start_silo(self, silo_id: str) -> None:
        """``seqr silo run`` at the owner's."""
        self.world.start(f"silo-{silo_id}", "silo", "run", "--dir", str(self.world.silo(silo_id)))

    def train(self, silo_id: str) -> str:
        """Queue a train job; returns its id."""
        return str(self.post("/v1/jobs", silo_id=silo_id, kind="train", reason="first training")["job_id"])

    def active(self) -> dict[str, dict[str, Any]]:
        """The active revision of every silo that has one."""
        return {row["silo_id"]: row for row in self.get("/v1/revisions") if row["state"] == "active"}

    def refused(self) -> list[str]:
        """What went wrong with revisions and trainings so far, in sentences."""
        revisions = [r for r in self.get("/v1/revisions") if r["state"] == "quarantined"]
        jobs = [j for j in self.get("/v1/jobs") if j["state"] == "failed" and j["kind"] == "train"]
        return [f"{row['silo_id']}: {row['code']}: {row['message']}" for row in [*revisions, *jobs]]

    def wait_active(self, silo_ids: Sequence[str], timeout_s: float) -> dict[str, dict[str, Any]]:
        """Until every silo has an active revision. Raises ``CommandFailed`` as soon as one is refused."""

        def ready() -> dict[str, dict[str, Any]] | None:
            if problems := self.refused():
                raise CommandFailed("; ".join(problems))
            active = self.active()
            return active if set(silo_ids) <= set(active) else None

        found: dict[str, dict[str, Any]] = self.world.wait(f"adapters of {', '.join(silo_ids)}", ready, timeout_s)
        return found

    def policy(self, *arguments: str) -> str:
        """``seqr policy ARGUMENTS`` as the admin."""
        return self.world.seqr("policy", *arguments, "--actor", "ada", *self._database)

    def audit_verifies(self) -> str:
        """``seqr policy audit verify``."""
        return self.world.seqr("policy", "audit", "verify", *self._database).strip()

    def new_key(self, user_id: str, scope: str) -> str:
        """Issue an API key; it is shown once."""
        arguments = ("policy", "key", "create", user_id, "--scope", scope, "--reason", "issued for the demo")
        return str(self.world.seqr_json(*arguments, "--actor", "ada", *self._database, *self._pepper)["key"])

    def add_user(self, user_id: str, role: str, scope: str) -> str:
        """Create a user and issue a key."""
        self.policy("user", "create", user_id, "--role", role, "--reason", "works here")
        return self.new_key(user_id, scope)

    def grant(self, user_id: str, silo_id: str, reason: str) -> str:
        """Allow a user to use a silo; returns the grant's id."""
        return str(
            self.post("/v1/grants", subject=f"user:{user_id}", silo_id=silo_id, effect="allow", reason=reason)[
                "grant_id"
            ]
        )

    def revoke(self, grant_id: str, reason: str) -> None:
        """End a grant at once."""
        _checked(
            self.api.request("DELETE", f"/v1/grants/{grant_id}", json={"reason": reason}, headers=self._if_match())
        )

    def get(self, path: str) -> Any:
        """GET with the admin's key."""
        return _checked(self.api.get(path))

    def post(self, path: str, **body: Any) -> Any:
        """POST with the admin's key."""
        return _checked(self.api.post(path, json=body, headers=self._if_match()))

    def _if_match(self) -> dict[str, str]:
        return {"If-Match": self.api.get("/v1/grants").headers.get("etag", "*")}

    @staticmethod
    def _answers(client: httpx.Client, path: str) -> bool:
        try:
            return client.get(path).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    @staticmethod
    def _write_key(path: Path, key: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_private(path, f"{key}\n".encode())


def _checked(response: httpx.Response) -> Any:
    if response.is_success:
        return response.json()
    problem = response.json()
    raise CommandFailed(f"{response.request.method} {response.request.url.path}: {problem.get('detail', problem)}")
