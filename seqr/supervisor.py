"""Child processes that are started, watched, restarted and ended together, leaving no orphan behind.

Every service runs in a process group of its own, so that ending it also ends whatever it started. A service ends by
itself when its supervisor dies without a word (``kill -9``), provided it calls :func:`follow_supervisor` at its start.
"""

import logging
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from seqr.errors import SeqrError

logger = logging.getLogger(__name__)

SUPERVISOR_PID = "SEQR_SUPERVISOR_PID"
LOG_LIMIT_BYTES = 8 * 1024 * 1024
STOP_GRACE_S = 6.0
# A service that lived this long had started properly, so its next restart need not wait.
HEALTHY_AFTER_S = 30.0
# Below those that Linux (from 32768 on) and macOS (from 49152 on) lend to outgoing connections.
_PORTS = range(20000, 32768)
_given: deque[int] = deque(maxlen=256)


class ServiceNotReady(SeqrError):
    """A service did not become ready within its time."""

    code = "service_not_ready"


class NoFreePort(SeqrError):
    """No port is left for a service."""

    code = "no_free_port"


@dataclass(frozen=True)
class Service:
    """One process: ``command`` is asked again at every start, so that it may name a fresh port.

    ``ready`` is polled until it answers true or ``ready_timeout_s`` seconds have passed. ``restart_delay_s`` is waited
    before a restart, doubled after every short life up to ``restart_delay_limit_s``.
    """

    name: str
    command: Callable[[], Sequence[str]]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    ready: Callable[[], bool] = lambda: True
    ready_timeout_s: float = 60.0
    restart_delay_s: float = 0.5
    restart_delay_limit_s: float = 8.0


class Supervisor:
    """Keeps a row of services alive.

    When one dies, it and those after it in the row are started again; with ``together``, all of them are. ``on_death``
    hears of every service found dead.
    """

    def __init__(
        self,
        services: Sequence[Service],
        *,
        together: bool = False,
        on_death: Callable[[Service], None] = lambda service: None,
    ) -> None:
        self.services = tuple(services)
        self._together = together
        self._on_death = on_death
        self._running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
        self._delay: dict[str, float] = {}
        self._wake = threading.Event()

    def start(self) -> None:
        """Start every service that is not running, in order. Raises ServiceNotReady."""
        for service in self.services:
            if service.name not in self._running:
                self._start(service)

    def watch_once(self) -> bool:
        """Restart what has died. True when something was restarted."""
        dead = [
            index
            for index, service in enumerate(self.services)
            if service.name not in self._running or self._running[service.name][0].poll() is not None
        ]
        if not dead:
            return False
        first = self.services[dead[0]]
        delay = self._restart_delay(first)
        logger.info("%s ended; starting it again in %.1f s", first.name, delay)
        self._on_death(first)
        affected = self.services if self._together else self.services[dead[0] :]
        for service in reversed(affected):
            self._end(service.name)
        self._wake.wait(delay)
        if self._wake.is_set():
            return False
        self._try_start()
        return True

    def watch(self, interval_s: float = 0.5) -> None:
        """Start what is not running, then keep everything running until :meth:`request_stop`."""
        self._try_start()
        while not self._wake.wait(interval_s):
            self.watch_once()

    def restart(self, name: str) -> None:
        """End one service and all after it, then start them again."""
        names = [service.name for service in self.services]
        for later in reversed(names[names.index(name) :]):
            self._end(later)
        self.start()

    def request_stop(self) -> None:
        """Make :meth:`watch` return soon; safe to call from a signal handler."""
        self._wake.set()

    def stop(self) -> None:
        """End every service, the last started first."""
        self._wake.set()
        for service in reversed(self.services):
            self._end(service.name)

    @property
    def pids(self) -> dict[str, int]:
        """The process id of every running service."""
        return {name: process.pid for name, (process, _) in self._running.items()}

    def _try_start(self) -> None:
        try:
            self.start()
        except ServiceNotReady as error:
            logger.warning("%s", error)

    def _restart_delay(self, service: Service) -> float:
        _, started = self._running.get(service.name, (None, time.monotonic()))
        if time.monotonic() - started > HEALTHY_AFTER_S:
            self._delay.pop(service.name, None)
        delay = self._delay.get(service.name, service.restart_delay_s)
        self._delay[service.name] = min(delay * 2, service.restart_delay_limit_s)
        return delay

    def _start(self, service: Service) -> None:
        environment = {**os.environ, **service.environment, SUPERVISOR_PID: str(os.getpid())}
        with _open_log(service.log) as log:
            process = subprocess.Popen(
                list(service.command()),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._running[service.name] = (process, time.monotonic())
        deadline = time.monotonic() + service.ready_timeout_s
        while not service.ready():
            if process.poll() is not None:
                raise ServiceNotReady(f"{service.name} ended with status {process.returncode}; see {service.log}")
            if time.monotonic() > deadline:
                self._end(service.name)
                raise ServiceNotReady(
                    f"{service.name} was not ready after {service.ready_timeout_s:.0f} s; see {service.log}"
                )
            if self._wake.wait(0.1):
                return

    def _end(self, name: str) -> None:
        process, _ = self._running.pop(name, (None, 0.0))
        if process is not None:
            end_group(process)


def end_group(process: "subprocess.Popen[bytes]", grace_s: float = STOP_GRACE_S) -> None:
    """End a process started as the leader of its own group, and everything in that group."""
    _signal_group(process.pid, signal.SIGTERM)
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        logger.warning("process %d did not end in %.0f s and is killed", process.pid, grace_s)
    # The leader may be gone while something it started still works: the group outlives its leader.
    _signal_group(process.pid, signal.SIGKILL)
    process.wait()


def follow_supervisor(interval_s: float = 1.0) -> None:
    """Kill the own process group once the supervisor that started this process is gone.

    To be called by a service itself. Without a supervisor (started by hand, or by an init system) it does nothing.
    """
    expected = os.environ.pop(SUPERVISOR_PID, "")
    if not expected.isdecimal():
        return

    def follow() -> None:
        while os.getppid() == int(expected):
            time.sleep(interval_s)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=follow, name="follow-supervisor", daemon=True).start()


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port nobody listens on at this moment, and which this process was not given lately.

    Not one that the system would choose: those are lent to outgoing connections, and one of these may have it by the
    time the service that it is meant for has started.
    """
    dice = random.SystemRandom()
    for _ in range(1000):
        port = dice.choice(_PORTS)
        if port in _given:
            continue
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
        _given.append(port)
        return port
    raise NoFreePort(f"no TCP port from {_PORTS.start} to {_PORTS.stop - 1} is free on {host}")


def accepts_connections(host: str, port: int) -> bool:
    """Whether a TCP connection to the address succeeds now."""
    try:
        with socket.create_connection((host, port), timeout=1.0):
            return True
    except OSError:
        return False


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return


def _open_log(path: Path) -> IO[bytes]:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if path.exists() and path.stat().st_size > LOG_LIMIT_BYTES:
        path.replace(path.with_suffix(path.suffix + ".1"))
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab")
