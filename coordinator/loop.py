"""The thread that carries deletions forward while the API serves; one per state directory, whoever starts first."""

import fcntl
import logging
import threading
from types import TracebackType
from typing import IO, Self

from coordinator.driver import Driver
from coordinator.settings import Settings

logger = logging.getLogger(__name__)


class Loop:
    """Ticks the driver until closed. A second process waits for the first one's lock, then takes over."""

    def __init__(self, settings: Settings, driver: Driver) -> None:
        self._settings = settings
        self._driver = driver
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="coordinator-loop", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with (self._settings.directory / "loop.lock").open("w") as lock:
            while not self._stop.is_set():
                if not _locked(lock):
                    self._stop.wait(1.0)
                    continue
                try:
                    self._driver.tick()
                except Exception:
                    # The loop is what brings deletions to their end: it must outlive a bug in one of its chores.
                    logger.exception("a tick failed")
                self._stop.wait(self._settings.loop_seconds)


def _locked(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
