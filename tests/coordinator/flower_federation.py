"""A federation of real Flower processes on loopback, for the tests in test_flower_processes.py."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from sqlalchemy import insert, select

from coordinator import job_queue, plans
from coordinator.certs import make_certificates
from coordinator.core import open_coordinator
from coordinator.db import now, reading, writing
from coordinator.models import outbox, silo_keys
from coordinator.models import silos as silo_table
from coordinator.settings import load_settings, make_settings
from coordinator.setup import init_state, use_certificate
from seqr.keys import SealingKey, SigningKey
from seqr.plan import GatewayKey, ModuleSpec, create_plan, sign_plan
from seqr.supervisor import accepts_connections, end_group, free_port

# Put in the place of silo_client.jobs, in ClientApp processes only.
STAND_IN = """
import os, sys, time, types
if "clientapp" in sys.orig_argv:
    jobs = types.ModuleType("silo_client.jobs")
    class JobReply:
        def __init__(self, status, code="", message="", attestation=None, bundle=None):
            self.status, self.code, self.message = status, code, message
            self.attestation, self.bundle = attestation, bundle
    def handle_job(order, plan, config):
        with open(config.directory / "handled", "ab") as file:
            file.write(order + b"\\n")
        pause = config.directory / "pause"
        deadline = time.monotonic() + 60
        while pause.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        return JobReply("ok")
    jobs.JobReply, jobs.handle_job = JobReply, handle_job
    sys.modules["silo_client.jobs"] = jobs
"""

RUN_SILO = "import sys; from silo_client.config import load_config; from silo_client.node import run; "
RUN_SILO += "run(load_config(sys.argv[1]), tell=lambda text: print(text, flush=True))"


def until(condition: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds:.0f} s"
        time.sleep(0.2)


class Silo:
    def __init__(self, folder: Path, silo_id: str, port: int, ca_file: Path, site: Path) -> None:
        self.folder, self.silo_id = folder / silo_id, silo_id
        self._site = site
        self.process: subprocess.Popen[bytes] | None = None
        (self.folder / "state").mkdir(parents=True)
        key = ec.generate_private_key(ec.SECP384R1())
        private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        (self.folder / "state" / "node.key").write_bytes(private)
        self.node_key = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
        self.private_key = key
        (self.folder / "silo.toml").write_text(
            f'silo_id = "{silo_id}"\nbase_model = "base"\n[coordinator]\npublic_key = "unused"\n'
            f'[superlink]\naddress = "localhost:{port}"\nca_file = "{ca_file}"\n[[data]]\npath = "records.jsonl"\n'
        )

    def start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(self._site)}
        with open(self.folder / "said", "ab") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-c", RUN_SILO, str(self.folder)],
                env=environment,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )

    def stop(self) -> None:
        if self.process is not None:
            end_group(self.process, 20)

    def handled(self) -> list[dict[str, object]]:
        file = self.folder / "handled"
        return [json.loads(line) for line in file.read_bytes().splitlines()] if file.exists() else []

    def log(self) -> str:
        file = self.folder / "state" / "flower" / "flower.log"
        return file.read_text(errors="replace") if file.exists() else ""

    def pid(self, name: str) -> int:
        """The one process of this silo with that name, found by its home directory."""
        return find(name, f"FLWR_HOME={self.folder}/state/flower/home")[0]


def find(name: str, variable: str) -> list[int]:
    """Ids of processes that run ``name`` of a flower_process module and have ``variable`` in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdecimal() else []
            if name.encode() in arguments and variable.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


class Federation:
    """A coordinator with two approved silos; nothing is running yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        site = folder / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(STAND_IN)
        directory = folder / "coordinator"
        self.port = free_port()
        settings = make_settings(directory=directory, superlink_port=self.port)
        init_state(settings, {"superlink_port": self.port})
        make_certificates(settings.certificates)
        use_certificate(settings)
        self.settings = load_settings(directory)
        self.coordinator = open_coordinator(self.settings)
        self.ca_file = settings.certificates / "ca.crt"
        self._store_plan()
        self.alpha, self.beta = (Silo(folder, name, self.port, self.ca_file, site) for name in ("alpha", "beta"))
        for silo in (self.alpha, self.beta):
            self.approve(silo)
        self.launcher: subprocess.Popen[bytes] | None = None

    def _store_plan(self) -> None:
        gateway = GatewayKey("gateway", SealingKey.generate().public.to_b64(), SigningKey.generate().public.to_b64())
        plan = create_plan(
            federation="test",
            base_model="none",
            base_model_digest="sha256:" + "0" * 64,
            modules=[ModuleSpec("model.q", 8, 8)],
            rank=2,
            alpha=4,
            seed=1,
            gateway_keys=[gateway],
        )
        envelope = sign_plan(plan, self.coordinator.key).to_json()
        with writing(self.coordinator.engine) as connection:
            plans.store(connection, envelope, self.coordinator.key.public, "test", "test")

    def approve(self, silo: Silo) -> None:
        with writing(self.coordinator.engine) as connection:
            row = {"silo_id": silo.silo_id, "display_name": silo.silo_id, "status": "approved", "approved_at": now()}
            row |= {"approved_by": "test", "policy_synced": True, "node_synced": True}
            connection.execute(insert(silo_table).values(row))
            key = {"kind": "node", "public_key": silo.node_key, "silo_id": silo.silo_id, "added_at": now()}
            connection.execute(insert(silo_keys).values(key))

    def start(self, **environment: str) -> None:
        command = [sys.executable, "-m", "seqr", "coordinator", "flower", "--dir", str(self.settings.directory)]
        env = {**os.environ, **environment}
        with open(self.folder / "launcher.log", "wb") as log:
            self.launcher = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)

    def stop(self) -> None:
        parts = [self.alpha.process, self.beta.process, self.launcher]
        for process in filter(None, parts):
            process.terminate()
        for process in filter(None, parts):
            end_group(process, 20)
        self.coordinator.close()

    def enqueue(self, silo: Silo) -> str:
        with writing(self.coordinator.engine) as connection:
            return job_queue.enqueue(connection, silo.silo_id, "ping", "test", "test")

    def job(self, job_id: str) -> dict[str, object]:
        with reading(self.coordinator.engine) as connection:
            return dict(job_queue.get(connection, job_id))

    def times_succeeded(self, job_id: str) -> int:
        with reading(self.coordinator.engine) as connection:
            events = connection.execute(select(outbox.c.detail).where(outbox.c.action == "job.succeeded")).scalars()
            return sum(detail["job_id"] == job_id for detail in events)

    def finish(self, job_id: str, seconds: float = 90) -> dict[str, object]:
        until(lambda: self.job(job_id)["state"] not in ("queued", "dispatched"), seconds, f"the end of {job_id}")
        return self.job(job_id)

    def pid(self, name: str) -> int:
        return find(name, f"FLWR_HOME={self.settings.directory}/flower/home")[0]

    @property
    def superlink(self) -> str:
        text = (self.settings.directory / "flower" / "home" / "config.toml").read_text()
        return re.findall(r'address = "([^"]+)"', text)[0]


class Elsewhere:
    """A SuperLink and a SuperExec as a container each, with the commands of docker-compose.yml."""

    def __init__(self, folder: Path, port: int, certificates: Path) -> None:
        self.folder, self.port, self.ca_file = folder, port, certificates / "ca.crt"
        self._server = [certificates / "server.crt", certificates / "server.key"]
        self._processes: list[subprocess.Popen[bytes]] = []
        folder.mkdir()
        self._secret = ["--superexec-auth-secret-file", str(folder / "secret")]
        (folder / "secret").write_bytes(os.urandom(48))

    def superlink(self) -> None:
        arguments = ["--host", "127.0.0.1", "--port", str(self.port), "--ssl-ca-certfile", str(self.ca_file)]
        arguments += ["--ssl-certfile", str(self._server[0]), "--ssl-keyfile", str(self._server[1])]
        program = str(Path(sys.executable).parent / "flower-superlink")
        self._run([program, *arguments, "--enable-supernode-auth", "--isolation", "process", *self._secret])
        until(lambda: accepts_connections("127.0.0.1", self.port), 60, "the start of the SuperLink")

    def superexec(self, *program: str, **environment: str) -> None:
        arguments = ["--runtime-api-address", f"localhost:{self.port}", "--root-certificates", str(self.ca_file)]
        self._run([*program, *arguments, *self._secret], **environment)

    def _run(self, command: list[str], **environment: str) -> None:
        path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
        env = {**os.environ, "PATH": path, "FLWR_HOME": str(self.folder / "home"), **environment}
        with open(self.folder / "log", "ab") as log:
            self._processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True))

    def stop(self) -> None:
        for process in reversed(self._processes):
            end_group(process)


def activate(federation: Federation, key: ec.EllipticCurvePrivateKey) -> int:
    """The HTTP status with which the SuperLink answers a SuperNode that has this key."""
    from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    with FleetHttpClient.from_server_address(
        f"localhost:{federation.port}",
        False,
        str(federation.ca_file),
        interceptors=[NodeAuthHttpInterceptor(key, key.public_key())],
    ) as client:
        try:
            response = client.ActivateNode(ActivateNodeRequest(public_key=public, heartbeat_interval=30))
            # A registration may end between the two calls: the second one's refusal is the answer then.
            client.DeactivateNode(DeactivateNodeRequest(node_id=response.node_id))
        except httpx.HTTPStatusError as error:
            return error.response.status_code
        return 200


def hostile_app(marker: Path) -> bytes:
    """An app under the name of ours whose components leave a mark; the ServerApp sends one message to every node."""
    from flwr.cli.build import build_fab_from_files

    from silo_client.thin_app import FILES

    touch = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
    server = (
        "import time\nfrom flwr.app import ConfigRecord, Message, RecordDict\nfrom flwr.serverapp import ServerApp\n"
        "app = ServerApp()\n@app.main()\ndef main(grid, context):\n"
        "    while not (nodes := list(grid.get_node_ids())):\n        time.sleep(0.5)\n"
        "    order = ConfigRecord({'envelope': b'{\"from\": \"stranger\"}', 'plan': b'{}'})\n"
        "    for node in nodes:\n"
        "        grid.push_messages([Message(RecordDict({'order': order}), node, 'train.job')])\n"
        "    time.sleep(60)\n"
    )
    client = "from silo_client.client_app import app\n"
    content, _ = build_fab_from_files(
        {
            **FILES,
            "seqr_flower/server_app.py": server.encode(),
            "seqr_flower/client_app.py": (touch + client).encode(),
            "seqr_flower/__init__.py": (touch if marker.name.startswith("stranger") else "").encode(),
        }
    )
    return bytes(content)


def descendants(of: int) -> set[int]:
    children: dict[int, set[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            children.setdefault(parent, set()).add(int(entry.name))
    found, fresh = set(), {of}
    while fresh:
        fresh = set().union(*(children.get(pid, set()) for pid in fresh)) - found
        found |= fresh
    return found
