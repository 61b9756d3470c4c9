"""``seqr coordinator up``: the API and Flower on one machine, each a process of its own, both kept alive."""

import signal
import sys
import time

from coordinator.settings import Settings
from seqr.supervisor import Service, Supervisor, accepts_connections


def run(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT. Raises ServiceNotReady when the API does not come up."""
    logs = settings.directory / "logs"
    logs.mkdir(exist_ok=True, mode=0o700)
    host = "127.0.0.1" if settings.host in {"0.0.0.0", "::"} else settings.host

    def command(name: str) -> list[str]:
        return [sys.executable, "-m", "seqr", "coordinator", name, "--dir", str(settings.directory)]

    # Apart: neither goes down with the other.
    api = Supervisor(
        [
            Service(
                "api",
                lambda: command("serve"),
                logs / "api.log",
                ready=lambda: accepts_connections(host, settings.port),
            )
        ]
    )
    flower = Supervisor([Service("flower", lambda: command("flower"), logs / "flower.log")])
    supervisors = (api, flower)
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True
        for supervisor in supervisors:
            supervisor.request_stop()

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for supervisor in supervisors:
            supervisor.start()
        while not stopping:
            for supervisor in supervisors:
                supervisor.watch_once()
            time.sleep(0.5)
    finally:
        for supervisor in reversed(supervisors):
            supervisor.stop()
        for number, handler in previous.items():
            signal.signal(number, handler)
