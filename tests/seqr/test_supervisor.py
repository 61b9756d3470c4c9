"""A supervisor starts, restarts and ends processes without leaving any behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from seqr.supervisor import NoFreePort, Service, ServiceNotReady, Supervisor, free_port

# A service that starts a child of its own, as Flower's SuperExec does, and writes both process ids down.
PARENT = """
import os, subprocess, sys, time
from seqr.supervisor import follow_supervisor
follow_supervisor(0.1)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[1], "a").write(f"{os.getpid()} {child.pid}\\n")
time.sleep(600)
"""


def until(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def lives(pid: int) -> bool:
    """Whether a process works; one that has ended and is only not yet buried does not."""
    state = subprocess.run(["ps", "-o", "state=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return state.strip()[:1] not in ("", "Z")


def pids(file: Path) -> list[tuple[int, int]]:
    if not file.exists():
        return []
    return [(int(a), int(b)) for a, b in (line.split() for line in file.read_text().splitlines())]


def service(name: str, folder: Path, **more: object) -> Service:
    command = [sys.executable, "-c", PARENT, str(folder / name)]
    ready = {"ready": lambda: len(pids(folder / name)) > 0, "restart_delay_s": 0.1}
    return Service(name, lambda: command, folder / "log", **{**ready, **more})  # type: ignore[arg-type]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Supervisor]]:
    started: list[Supervisor] = []

    def make(*services: Service, **more: bool) -> Supervisor:
        started.append(Supervisor(services, **more))  # type: ignore[arg-type]
        started[-1].start()
        return started[-1]

    yield make
    for supervisor in started:
        supervisor.stop()


def test_stop_ends_what_a_service_started_too(tmp_path: Path, start: Callable[..., Supervisor]) -> None:
    supervisor = start(service("a", tmp_path))
    parent, child = pids(tmp_path / "a")[0]
    supervisor.stop()
    assert not lives(parent) and not lives(child)


def test_killed_service_is_restarted_and_its_child_does_not_outlive_it(
    tmp_path: Path, start: Callable[..., Supervisor]
) -> None:
    supervisor = start(service("a", tmp_path))
    parent, child = pids(tmp_path / "a")[0]
    os.kill(parent, signal.SIGKILL)
    until(supervisor.watch_once)
    until(lambda: len(pids(tmp_path / "a")) == 2)
    assert not lives(child)
    assert lives(pids(tmp_path / "a")[1][0])


def test_death_restarts_the_later_services_and_leaves_the_earlier_ones(
    tmp_path: Path, start: Callable[..., Supervisor]
) -> None:
    supervisor = start(service("a", tmp_path), service("b", tmp_path), service("c", tmp_path))
    os.kill(pids(tmp_path / "b")[0][0], signal.SIGKILL)
    until(supervisor.watch_once)
    until(lambda: len(pids(tmp_path / "b")) == 2 and len(pids(tmp_path / "c")) == 2)
    assert len(pids(tmp_path / "a")) == 1


def test_services_bound_together_restart_together(tmp_path: Path, start: Callable[..., Supervisor]) -> None:
    supervisor = start(service("a", tmp_path), service("b", tmp_path), together=True)
    os.kill(pids(tmp_path / "b")[0][0], signal.SIGKILL)
    until(supervisor.watch_once)
    until(lambda: len(pids(tmp_path / "a")) == 2 and len(pids(tmp_path / "b")) == 2)
    assert not lives(pids(tmp_path / "a")[0][0])


def test_killed_supervisor_leaves_no_orphan(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from seqr.supervisor import Service, Supervisor\n"
        f"command = [sys.executable, '-c', {PARENT!r}, {str(tmp_path / 'a')!r}]\n"
        f"Supervisor([Service('a', lambda: command, Path({str(tmp_path / 'log')!r}))]).start()\n"
        "time.sleep(600)\n"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", script])
    until(lambda: len(pids(tmp_path / "a")) == 1)
    supervisor.kill()
    supervisor.wait()
    parent, child = pids(tmp_path / "a")[0]
    until(lambda: not lives(parent) and not lives(child))


def test_service_that_never_becomes_ready_is_named_and_ended(tmp_path: Path) -> None:
    supervisor = Supervisor([service("slow", tmp_path, ready=lambda: False, ready_timeout_s=1.5)])
    with pytest.raises(ServiceNotReady, match="slow was not ready after 2 s"):
        supervisor.start()
    assert not any(lives(pid) for pair in pids(tmp_path / "slow") for pid in pair)


def test_service_that_ends_at_once_is_named_with_its_status(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit(7)"]
    broken = Service("broken", lambda: command, tmp_path / "log", ready=lambda: False)
    with pytest.raises(ServiceNotReady, match="broken ended with status 7"):
        Supervisor([broken]).start()


def test_logs_are_for_their_owner_only(tmp_path: Path, start: Callable[..., Supervisor]) -> None:
    start(service("a", tmp_path))
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


def test_a_free_port_is_none_that_an_outgoing_connection_may_be_lent() -> None:
    ports = [free_port() for _ in range(50)]
    assert len(set(ports)) == 50
    assert all(20000 <= port < 32768 for port in ports)
    for port in ports:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", port))


def test_a_taken_port_is_not_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", taken := free_port()))
        monkeypatch.setattr("seqr.supervisor._PORTS", range(taken, taken + 1))
        monkeypatch.setattr("seqr.supervisor._given", deque[int]())
        with pytest.raises(NoFreePort, match=f"no TCP port from {taken} to {taken} is free"):
            free_port()
