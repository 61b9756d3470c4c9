"""A gateway as operators run it, a process of its own, with a small coordinator and a policy that are made for it."""

import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from inference_gateway.setup import initialise
from policy.db import create_engine_for, upgrade
from policy.keys import create_pepper
from policy.store import PolicyStore
from seqr.bench.errors import BenchFailed
from seqr.bench.gateway.options import Options
from seqr.bench.gateway.shelf import bench_plan, random_adapter, silo_name
from seqr.bundle import Manifest, seal, sign_manifest
from seqr.document import utc_now, utc_text
from seqr.keys import SigningKey
from seqr.models import load_base_model
from seqr.plan import GatewayKey, Plan, sign_plan
from seqr.supervisor import SUPERVISOR_PID, end_group, free_port

_HOW: dict[str, Any] = {"actor": "bench", "reason": "a benchmark"}
_API_KEY = "seqr_benchmark_coordinator"
_READY_S = 900.0


@dataclass
class _Registry:
    """What the small coordinator knows: the signed plan and one staged revision per silo."""

    plan: Plan
    key: SigningKey
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)

    def stage(self, index: int) -> None:
        """Seal a random adapter and offer it."""
        silo, revision_id, adapter = silo_name(index), f"rev-{index:05d}", random_adapter(self.plan, index)
        signer = SigningKey.generate()
        manifest = Manifest(
            plan_id=self.plan.plan_id,
            silo_id=silo,
            revision=1,
            job_nonce=f"nonce-{index:05d}",
            tensors=adapter.tensor_digests(),
            adapter_digest=adapter.digest,
            records=None,
            tokens=None,
            environment={},
            dataset_root="0" * 64,
            expires_at=utc_text(utc_now() + timedelta(days=1)),
        )
        blob = seal(adapter, sign_manifest(manifest, signer), self.plan.gateway_keys)
        self.blobs[revision_id] = blob
        self.rows[revision_id] = {
            "revision_id": revision_id,
            "silo_id": silo,
            "plan_id": self.plan.plan_id,
            "revision": 1,
            "state": "staged",
            "sealed_sha256": sha256(blob).hexdigest(),
            "expectation": {
                "silo_keys": [signer.public.to_b64()],
                "job_nonce": manifest.job_nonce,
                "revision": 1,
                "tombstoned_digests": [],
            },
        }

    def get(self, path: str) -> bytes | None:
        """The answer to a GET of the gateway's part of the interface."""
        if path == "/v1/gateway/plan":
            return sign_plan(self.plan, self.key).to_json()
        if path == "/v1/gateway/revisions":
            return json.dumps(list(self.rows.values())).encode()
        return self.blobs.get(path.removeprefix("/v1/gateway/revisions/").removesuffix("/bundle"))

    def post(self, path: str, body: Mapping[str, Any]) -> None:
        """A verdict of the gateway."""
        revision_id, _, verb = path.removeprefix("/v1/gateway/revisions/").partition("/")
        if verb == "quarantined":
            self.rows[revision_id]["state"] = "quarantined"
        elif verb == "admitted":
            self.rows[revision_id] |= {"state": "active", "adapter_digest": body["adapter_digest"]}


@contextmanager
def _coordinator(registry: _Registry) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(registry.get(self.path))

        def do_POST(self) -> None:
            registry.post(self.path, json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self._answer(b"{}")

        def _answer(self, body: bytes | None) -> None:
            self.send_response(200 if body is not None else 404)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing is logged."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass(frozen=True)
class Served:
    """A gateway that answers. ``keys``: by user; the user number i may use the silos 0 to i, but for the last one."""

    url: str
    model: str
    pid: int
    keys: Mapping[str, str]


@contextmanager
def served_gateway(options: Options, directory: Path, adapters: int, users: int) -> Iterator[Served]:
    """A gateway over the model of ``options`` with ``adapters`` silos; its files go to ``directory``.

    Raises ``BenchFailed`` when it does not become ready.
    """
    public, _ = initialise(directory, {})
    registry = _registry(options, GatewayKey(**public), adapters)
    port, policy = free_port(), f"sqlite:///{(directory / 'policy.db').absolute()}"
    keys = _policy(policy, directory, adapters, users)
    with _coordinator(registry) as coordinator:
        given = {
            "coordinator_url": coordinator,
            "coordinator_public_key": registry.key.public.to_b64(),
            "policy_database_url": policy,
            "base_model": str(options.model.absolute()),
            "port": port,
            "threads": torch.get_num_threads(),
        }
        lines = [f"{name} = {json.dumps(value)}" for name, value in given.items()]
        (directory / "gateway.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
        with _process(directory) as process:
            url = f"http://127.0.0.1:{port}"
            _await_ready(url, process, directory, registry)
            yield Served(url, options.model.name, process.pid, keys)


def _registry(options: Options, key: GatewayKey, adapters: int) -> _Registry:
    model, _ = load_base_model(options.model, getattr(torch, options.dtype))
    registry = _Registry(bench_plan(options.model, model, options.rank, options.dtype, key), SigningKey.generate())
    for index in range(adapters):
        registry.stage(index)
    return registry


def _policy(url: str, directory: Path, adapters: int, users: int) -> dict[str, str]:
    upgrade(url)
    database = create_engine_for(url)
    store = PolicyStore(database, create_pepper(directory / "policy.pepper"))
    (directory / "coordinator-api.key").write_text(_API_KEY + "\n", encoding="utf-8")
    for index in range(adapters):
        store.add_silo(silo_name(index), **_HOW)
    keys = {}
    for number in range(users):
        user = f"user{number}"
        store.create_user(user, **_HOW)
        keys[user] = store.create_key(user, ["chat"], **_HOW).secret
        for index in range(min(number + 1, adapters - 1)):
            store.add_grant(f"user:{user}", silo_name(index), **_HOW)
    database.dispose()
    return keys


@contextmanager
def _process(directory: Path) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-m", "seqr", "gateway", "serve", "--dir", str(directory)]
    with (directory / "gateway.log").open("ab") as log:
        environment = {**os.environ, SUPERVISOR_PID: str(os.getpid())}  # it must not outlive this process
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            yield process
        finally:
            end_group(process)


def _await_ready(url: str, process: "subprocess.Popen[bytes]", directory: Path, registry: _Registry) -> None:
    deadline = time.monotonic() + _READY_S
    while process.poll() is None and time.monotonic() < deadline:
        states = {row["state"] for row in registry.rows.values()}
        if "quarantined" in states:
            break
        if states == {"active"} and _ready(url):
            return
        time.sleep(0.2)
    log = (directory / "gateway.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    raise BenchFailed(f"the gateway did not become ready: {(log or ['it said nothing'])[-1]:.300}")


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
