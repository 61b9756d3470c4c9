"""``seqr coordinator flower``: starts and keeps alive everything of Flower that the coordinator needs on this machine.

    silos --TLS--> fleet proxy (superlink_host:superlink_port, /v1/fleet/ only)
                        |
                   SuperLink (loopback, a port of its own, database in memory) <-- FlowerNodes, from the REST API too
                        |
                   SuperExec --starts--> the resident ServerApp (coordinator.server_app)

With ``superlink_address`` set, the SuperLink, its SuperExec and the filter before it run elsewhere, as in
docker-compose.yml; the launcher then only keeps node keys registered and the resident run alive.
"""

import fcntl
import logging
import os
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from coordinator.certs import make_certificates
from coordinator.errors import LauncherRunning, SettingsInvalid
from coordinator.flower_nodes import CONNECTION, FlowerNodes, NodeKeySpent, SuperLinkUnreachable
from coordinator.flower_process import LOCK_NAME, TOKEN_DIRECTORY, build_app
from coordinator.settings import Settings
from seqr.files import write_private
from seqr.supervisor import Service, Supervisor, accepts_connections, free_port

__all__ = ["FlowerLauncher", "FlowerNodes", "NodeKeySpent", "SuperLinkUnreachable", "flower_environment"]

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
TICK_S = 1.0
# The table of node keys is compared at once when it changes, and this often in any case.
SYNC_S = 10.0
# What a ServerApp may take to start, and how long a living one may stay silent (a bundle of 1 GiB takes a while).
RUN_START_S = 60.0
RUN_RETRY_S = 3.0
RUN_SILENT_S = 300.0

NodeKeys = Callable[[], Mapping[str, str]]


class FlowerLauncher:
    """Runs until :meth:`request_stop`. ``node_keys`` gives the node key -> silo id of every silo that may connect."""

    def __init__(self, settings: Settings, node_keys: NodeKeys) -> None:
        self._settings = settings
        self._node_keys = node_keys
        self._folder = _Folder(settings.directory / "flower")
        self._nodes = FlowerNodes(settings)
        self._app = build_app()
        self._run_started = float("-inf")
        self._synced: tuple[Mapping[str, str], float] = ({}, float("-inf"))
        self._stopping = False
        # The SuperLink's own port: the same one after every restart, so that the proxy finds it again.
        self._port = 0
        self.supervisor = Supervisor([], on_death=self._forget_run)
        self.proxy = Supervisor([])

    def run(self) -> None:
        """Start everything and keep it alive. Raises SettingsInvalid, ServiceNotReady at the first start only."""
        previous = {n: signal.signal(n, lambda *_: self.request_stop()) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            self.start()
            while not self._stopping:
                self.tick()
                time.sleep(TICK_S)
        finally:
            self.stop()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def start(self) -> None:
        """Start the processes; node keys and the resident run follow with the first ticks."""
        self._folder.claim()
        self._folder.prepare()
        environment = flower_environment(self._settings, self._folder)
        if self._settings.superlink_address:
            if self._settings.superlink_ca_file is None:
                raise SettingsInvalid(
                    "superlink_address needs superlink_ca_file, the CA of the SuperLink's certificate"
                )
            self._folder.write_connection(self._settings.superlink_address, self._settings.superlink_ca_file)
            return
        self._folder.renew_certificate()
        self._port = free_port(LOOPBACK)
        self._folder.write_connection(f"{LOOPBACK}:{self._port}", self._folder.tls / "ca.crt")
        self.supervisor = Supervisor(self._superlink_services(environment), on_death=self._forget_run)
        self.supervisor.start()
        self.proxy = Supervisor([self._proxy_service(environment)])
        self.proxy.start()

    def tick(self) -> None:
        """Restart what died, then see to the node keys and the resident run."""
        self.supervisor.watch_once()
        self.proxy.watch_once()
        try:
            self._sync_nodes()
            self._keep_run()
        except SuperLinkUnreachable as error:
            logger.warning("%s", error)
        except SQLAlchemyError as error:
            # The database restarts now and then; Flower need not go down with it.
            logger.warning("the coordinator's database does not answer: %s", type(error).__name__)

    def request_stop(self) -> None:
        """Make :meth:`run` return; safe in a signal handler."""
        self._stopping = True
        self.supervisor.request_stop()
        self.proxy.request_stop()

    def stop(self) -> None:
        """End all processes, silos' way in first."""
        self.proxy.stop()
        self.supervisor.stop()

    def _forget_run(self, _service: Service) -> None:
        self._run_started = float("-inf")
        self._synced = ({}, float("-inf"))

    def _sync_nodes(self) -> None:
        wanted = dict(self._node_keys())
        before, at = self._synced
        if wanted == before and time.monotonic() - at < SYNC_S:
            return
        for silo_id in self._nodes.sync(self._node_keys):
            logger.warning("silo %s can connect again only after a restart of `seqr coordinator flower`", silo_id)
        self._synced = (wanted, time.monotonic())

    def _keep_run(self) -> None:
        now = time.monotonic()
        if self._folder.server_app_alive() or now - self._run_started < RUN_RETRY_S:
            return
        if now - self._run_started < RUN_START_S and not self._folder.server_app_seen_since(self._run_started):
            return
        if self._folder.server_app_hangs() and "superexec" in self.supervisor.pids:
            logger.warning("the resident ServerApp hangs and is ended")
            self.supervisor.restart("superexec")
        self._nodes.stop_runs(self._nodes.unfinished_runs())
        run_id = self._nodes.start_run(self._app)
        self._run_started = now
        logger.info("resident run %d started", run_id)

    def _superlink_services(self, environment: Mapping[str, str]) -> list[Service]:
        folder, secret, port = self._folder, str(self._folder.secret), self._port

        def superlink() -> list[str]:
            return [
                *_python("coordinator.flower_process", "superlink", "--host", LOOPBACK, "--port", str(port)),
                *("--ssl-ca-certfile", str(folder.tls / "ca.crt")),
                *("--ssl-certfile", str(folder.tls / "server.crt"), "--ssl-keyfile", str(folder.tls / "server.key")),
                *("--enable-supernode-auth", "--isolation", "process", "--superexec-auth-secret-file", secret),
                "--disable-runtime-dependency-installation",
            ]

        def superexec() -> list[str]:
            return [
                *_python("coordinator.flower_process", "superexec", "--runtime-api-address", f"{LOOPBACK}:{port}"),
                *("--root-certificates", str(folder.tls / "ca.crt"), "--superexec-auth-secret-file", secret),
            ]

        return [
            Service(
                "superlink",
                superlink,
                folder.logs / "superlink.log",
                environment,
                ready=lambda: accepts_connections(LOOPBACK, port),
            ),
            Service("superexec", superexec, folder.logs / "superexec.log", environment),
        ]

    def _proxy_service(self, environment: Mapping[str, str]) -> Service:
        settings = self._settings
        if settings.superlink_certfile is None or settings.superlink_keyfile is None:
            raise SettingsInvalid(
                "superlink_certfile and superlink_keyfile are needed for the port silos connect to; "
                "`seqr coordinator certs` makes a pair for this machine"
            )
        certificate, key = settings.superlink_certfile, settings.superlink_keyfile

        def command() -> list[str]:
            return [
                *_python("coordinator.fleet_proxy", "--host", settings.superlink_host),
                *("--port", str(settings.superlink_port), "--certfile", str(certificate), "--keyfile", str(key)),
                *("--upstream", f"{LOOPBACK}:{self._port}", "--upstream-ca", str(self._folder.tls / "ca.crt")),
            ]

        host = LOOPBACK if settings.superlink_host in {"0.0.0.0", "::"} else settings.superlink_host
        return Service(
            "fleet-proxy",
            command,
            self._folder.logs / "fleet-proxy.log",
            environment,
            ready=lambda: accepts_connections(host, settings.superlink_port),
        )


class _Folder:
    """``<directory>/flower``: Flower's home, the SuperExec secret, loopback certificates, task tokens and logs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.home = path / "home"
        self.tls = path / "tls"
        self.tokens = path / "tokens"
        self.logs = path / "logs"
        self.secret = path / "superexec.secret"
        self.config = self.home / "config.toml"
        self.lock = path / LOCK_NAME

    def claim(self) -> None:
        """Refuse a second launcher here: it would cut off the silos of the first. Raises LauncherRunning."""
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._claim = open(self.path / "launcher.lock", "w")  # noqa: SIM115 - held for the life of the process
        try:
            fcntl.flock(self._claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LauncherRunning(
                f"another `seqr coordinator flower` runs in {self.path.parent}; stop it before starting a new one"
            ) from None

    def prepare(self) -> None:
        for stale in (self.tokens, self.home / "apps"):
            shutil.rmtree(stale, ignore_errors=True)
        for folder in (self.path, self.home, self.tokens, self.logs):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.chmod(0o700)
        write_private(self.secret, secrets.token_bytes(48))

    def renew_certificate(self) -> None:
        """A certificate for this machine's inner connections; nobody keeps the key of the CA that signed it."""
        shutil.rmtree(self.tls, ignore_errors=True)
        make_certificates(self.tls)
        (self.tls / "ca.key").unlink()

    def write_connection(self, address: str, ca_file: Path) -> None:
        """Tell ``flwr`` and FlowerNodes where the SuperLink is."""
        text = f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "{address}"\n'
        text += f'root-certificates = "{ca_file}"\n'
        partial = self.config.with_suffix(".partial")
        partial.write_text(text)
        partial.replace(self.config)

    def server_app_alive(self) -> bool:
        """Whether a ServerApp holds its lock and has shown itself lately."""
        return self._locked() and not self._silent()

    def server_app_hangs(self) -> bool:
        """Whether a ServerApp lives that has not shown itself for long."""
        return self._locked() and self._silent()

    def server_app_seen_since(self, started: float) -> bool:
        """Whether a ServerApp touched its lock after ``started`` (monotonic)."""
        return self._age() < time.monotonic() - started

    def _locked(self) -> bool:
        try:
            with open(self.lock) as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        return False

    def _silent(self) -> bool:
        return self._age() > RUN_SILENT_S

    def _age(self) -> float:
        try:
            return time.time() - self.lock.stat().st_mtime
        except FileNotFoundError:
            return float("inf")


def flower_environment(settings: Settings, folder: _Folder) -> dict[str, str]:
    """What every Flower process of the coordinator gets: no telemetry, no update check, a home of its own."""
    bypass = ",".join(filter(None, [os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), LOOPBACK, "localhost"]))
    return {
        "FLWR_HOME": str(folder.home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_LOG_LEVEL": "WARNING",
        "SEQR_COORDINATOR_DIRECTORY": str(settings.directory),
        TOKEN_DIRECTORY: str(folder.tokens),
        # A module lying in the working directory must not be imported in place of an installed one.
        "PYTHONSAFEPATH": "1",
        "NO_PROXY": bypass,
        "no_proxy": bypass,
    }


def _python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]
