"""The demo's folder, its ports and its processes: everything on loopback, everything under one directory."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seqr.errors import SeqrError
from seqr.supervisor import SUPERVISOR_PID, end_group, free_port

LOOPBACK = "127.0.0.1"
POLL_S = 0.5
# `coordinator up` first ends the row of processes below it, each with a grace of its own.
STOP_GRACE_S = 30.0
# A command that neither ends nor fails in this time hangs.
COMMAND_TIMEOUT_S = 300.0


class CommandFailed(SeqrError):
    """A ``seqr`` command that the demo relies on ended with an error."""

    code = "command_failed"


class StepTimedOut(SeqrError):
    """Something the demo waits for did not happen in time."""

    code = "step_timed_out"


@dataclass
class World:
    """One run of the demo. ``start`` and ``seqr`` run the same commands that a user would type."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)
    processes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.logs.mkdir(exist_ok=True, mode=0o700)
        self.coordinator_port, self.superlink_port, self.gateway_port = (free_port() for _ in range(3))

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def coordinator(self) -> Path:
        return self.root / "coordinator"

    @property
    def gateway(self) -> Path:
        return self.root / "gateway"

    @property
    def coordinator_url(self) -> str:
        return f"https://{LOOPBACK}:{self.coordinator_port}"

    @property
    def gateway_url(self) -> str:
        return f"http://{LOOPBACK}:{self.gateway_port}"

    def silo(self, silo_id: str) -> Path:
        """The directory of one silo."""
        return self.root / "silos" / silo_id

    def seqr(self, *arguments: str) -> str:
        """Run ``seqr ARGUMENTS`` to its end and return what it printed. Raises ``CommandFailed``."""
        done = subprocess.run(
            _command(arguments),
            cwd=self.root,
            env=self._environment({}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip().splitlines() or ["(nothing)"]
            raise CommandFailed(f"'seqr {' '.join(arguments)}' ended with status {done.returncode}: {said[-1]}")
        return done.stdout

    def seqr_json(self, *arguments: str) -> Any:
        """Run ``seqr ARGUMENTS --json`` and return what it printed, parsed."""
        return json.loads(self.seqr(*arguments, "--json"))

    def start(self, name: str, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        """Start ``seqr ARGUMENTS`` as a process of its own, its output in ``logs/NAME.log``."""
        with (self.logs / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                _command(arguments),
                cwd=self.root,
                env={**self._environment(environment or {}), SUPERVISOR_PID: str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self, what: str, ready: Callable[[], Any], timeout_s: float) -> Any:
        """Poll ``ready`` until it returns something true. Raises ``StepTimedOut``, or the end of a process by name."""
        deadline = time.monotonic() + timeout_s
        while True:
            result = ready()
            if result:
                return result
            for name, process in self.processes.items():
                if process.poll() is not None:
                    raise StepTimedOut(
                        f"{name} ended with status {process.returncode} while waiting for {what}; "
                        f"see {self.logs / name}.log"
                    )
            if time.monotonic() > deadline:
                raise StepTimedOut(f"{what} did not happen in {timeout_s:.0f} s; the logs are in {self.logs}")
            time.sleep(POLL_S)

    def stop(self) -> None:
        """End every process, the last started first."""
        for process in reversed(list(self.processes.values())):
            end_group(process, STOP_GRACE_S)
        self.processes.clear()

    def _environment(self, extra: Mapping[str, str]) -> dict[str, str]:
        return {**os.environ, **self.environment, **extra}


def _command(arguments: Sequence[str]) -> list[str]:
    # As the installed command does: nothing is imported from the working directory.
    return [sys.executable, "-P", "-m", "seqr", *arguments]
