"""``seqr silo run``: a SuperNode waits for orders, and a SuperExec starts the ClientApp for each.

Both die and are started again together, so that a killed SuperNode never leaves a training process behind that would
write into the same checkpoint as its successor.
"""

import fcntl
import logging
import os
import re
import secrets
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from seqr.files import write_private
from seqr.supervisor import Service, Supervisor, accepts_connections, follow_supervisor, free_port
from silo_client.config import SiloConfig
from silo_client.errors import ConfigInvalid, SiloBusy
from silo_client.flower_process import NODE_FILE, TOKEN_DIRECTORY

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
NODE_KEY = "node.key"
RETRY_S, RETRY_LIMIT_S = 1.0, 4.0
# What Flower's exit codes mean for a data owner.
EXPLANATIONS = {
    "305": "the coordinator does not let this silo in: 'seqr silo enrol' asks to join, an admin approves; "
    "or its last connection has not timed out yet",
    "600": "an address in silo.toml cannot be understood",
}


def run(config: SiloConfig, *, tell: Callable[[str], None] = logger.info) -> None:
    """Stay connected until SIGTERM or SIGINT. ``tell`` receives one sentence per change.

    Raises:
        ConfigInvalid: the address or CA certificate of the SuperLink is not set, or a file is missing.
        SiloBusy: this silo is already running.
    """
    follow_supervisor()
    # Its sentences are for operators; ``tell`` has one for the owner.
    logging.getLogger("seqr.supervisor").setLevel(logging.WARNING)
    with _only_one(config.state_dir):
        supervisor = supervise(config, tell)

        def stop(_number: int, _frame: object) -> None:
            supervisor.request_stop()

        previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            tell(f"silo {config.silo_id} takes its orders from {config.superlink.address}")
            supervisor.watch()
        finally:
            supervisor.stop()
            for number, handler in previous.items():
                signal.signal(number, handler)
        tell(f"silo {config.silo_id} has stopped")


def supervise(config: SiloConfig, tell: Callable[[str], None] = logger.info) -> Supervisor:
    """The supervisor of this silo's two Flower processes, none of them started yet."""
    address, certificate, key = _checked(config)
    work = config.state_dir / "flower"
    home, tokens, secret = work / "home", work / "tokens", work / "superexec.secret"
    # An app that an earlier run left here would be taken for the one that is installed now.
    shutil.rmtree(home / "apps", ignore_errors=True)
    for folder in (work, home, tokens):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
    write_private(secret, secrets.token_bytes(48))
    environment = flower_environment(config, work)
    log = _Log(work / "flower.log")
    port = _Port()

    def supernode() -> list[str]:
        log.mark()
        arguments = ["--superlink", address, "--root-certificates", str(certificate)]
        arguments += ["--auth-supernode-private-key", str(key), "--host", LOOPBACK, "--port", str(port.renew())]
        return _python("supernode", *arguments, "--isolation", "process", "--superexec-auth-secret-file", str(secret))

    def superexec() -> list[str]:
        arguments = ["--runtime-api-address", f"{LOOPBACK}:{port.number}", "--insecure"]
        return _python("superexec", *arguments, "--superexec-auth-secret-file", str(secret))

    told = ""

    def explain(service: Service) -> None:
        nonlocal told
        sentence = f"{service.name}: {EXPLANATIONS.get(log.exit_code(), f'ended; see {log.path}')}; trying again"
        if sentence != told:  # and not every few seconds again while it stays so
            tell(sentence)
        told = sentence

    return Supervisor(
        [
            Service(
                "supernode",
                supernode,
                log.path,
                environment,
                ready=lambda: accepts_connections(LOOPBACK, port.number),
                restart_delay_s=RETRY_S,
                restart_delay_limit_s=RETRY_LIMIT_S,
            ),
            Service("superexec", superexec, log.path, environment),
        ],
        together=True,
        on_death=explain,
    )


def flower_environment(config: SiloConfig, work: Path) -> dict[str, str]:
    """What every Flower process of this silo gets: no telemetry, no update check, a home of its own."""
    bypass = ",".join(filter(None, [os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), LOOPBACK, "localhost"]))
    return {
        "FLWR_HOME": str(work / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "SEQR_SILO_DIRECTORY": str(config.directory),
        TOKEN_DIRECTORY: str(work / "tokens"),
        NODE_FILE: str(work / "node.id"),
        "HF_HUB_OFFLINE": "1",
        # A module lying in the working directory must not be imported in place of an installed one.
        "PYTHONSAFEPATH": "1",
        "NO_PROXY": bypass,
        "no_proxy": bypass,
    }


class _Port:
    """The SuperNode's loopback port: a fresh one at every start, which the SuperExec reads after it."""

    def __init__(self) -> None:
        self.number = 0

    def renew(self) -> int:
        self.number = free_port(LOOPBACK)
        return self.number


class _Log:
    """The log of both processes, and where in it the present SuperNode began."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start = 0

    def mark(self) -> None:
        self._start = self.path.stat().st_size if self.path.exists() else 0

    def exit_code(self) -> str:
        """Flower's exit code of the SuperNode that has ended, or an empty string."""
        with self.path.open("rb") as file:
            file.seek(self._start)
            found = re.findall(rb"Exit Code: (\d+)", file.read())
        return found[-1].decode() if found else ""


def _python(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "silo_client.flower_process", name, *arguments]


def _checked(config: SiloConfig) -> tuple[str, Path, Path]:
    if not config.superlink.address or config.superlink.ca_file is None:
        raise ConfigInvalid(
            "'superlink' needs an address (host:port) and a ca_file in silo.toml before the silo can run"
        )
    certificate = config.resolve(config.superlink.ca_file)
    key = config.state_dir / NODE_KEY
    if not certificate.is_file():
        raise ConfigInvalid(f"the CA certificate {certificate} does not exist; see ca_file in silo.toml")
    if not key.is_file():
        raise ConfigInvalid(
            f"the node key {key} does not exist; restore it from a backup, or run 'seqr silo init' in a new directory "
            "and enrol it"
        )
    return config.superlink.address, certificate, key


@contextmanager
def _only_one(state: Path) -> Iterator[None]:
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(state / "run.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SiloBusy("this silo is already running; stop the other 'seqr silo run' first") from None
        yield
