"""A process of its own for an engine or a peer, so that nothing else computes there.

OpenMP stops waiting actively once a process has more thread pools than processors, and every small operation then
waits to be woken. Engines in one process would slow each other down, even if only one of them is asked at a time.
"""

import asyncio
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from typing import Any

from seqr.bench.errors import BenchFailed
from seqr.errors import SeqrError

log = logging.getLogger(__name__)
Build = Callable[..., Awaitable[object]]


class Child:
    """What ``build(*args)`` gives, in a process that sleeps until it is asked. ``build`` and all values are pickled.

    The process ends with ``close``, after an error, and with this process, however that one ends. ``ready`` and ``ask``
    raise what was raised there if it is a ``SeqrError``, and ``BenchFailed`` for anything else that ended it.
    """

    def __init__(self, name: str, build: Build, *args: Any):
        context = multiprocessing.get_context("spawn")
        self._name = name
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_live, args=(theirs, name, build, args), name=name, daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int | None:
        """The process."""
        return self._process.pid

    async def ready(self) -> None:
        """Wait until it is built."""
        await self._answer()

    async def ask(self, method: str, *args: Any) -> Any:
        """What the coroutine ``method`` of the object gives there."""
        try:
            self._pipe.send((method, args))
        except OSError:
            raise BenchFailed(self._end()) from None
        return await self._answer()

    def close(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    async def _answer(self) -> Any:
        loop, there = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._pipe.fileno(), there.set)
        try:
            await there.wait()
        finally:
            loop.remove_reader(self._pipe.fileno())
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError):
            raise BenchFailed(self._end()) from None
        if isinstance(answer, SeqrError):
            raise answer
        return answer

    def _end(self) -> str:
        self._process.join(10)
        code = self._process.exitcode
        if code is not None and code < 0:
            most_often = ", most often because memory ran out" if -code == signal.SIGKILL else ""
            return f"{self._name}: its process was ended by {signal.Signals(-code).name}{most_often}"
        return f"{self._name}: its process ended with status {code}"


def _live(pipe: Connection, name: str, build: Build, args: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its children
    threading.Thread(target=_end_with_parent, name="end with parent", daemon=True).start()
    asyncio.run(_serve(pipe, name, build, args))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


async def _serve(pipe: Connection, name: str, build: Build, args: tuple[Any, ...]) -> None:
    try:
        built = await build(*args)
        pipe.send(None)
        while True:
            try:
                method, given = pipe.recv()
            except EOFError:  # the parent has gone
                return
            pipe.send(await getattr(built, method)(*given))
    except SeqrError as error:
        pipe.send(error)
    except Exception as error:
        log.exception("%s failed", name)
        pipe.send(BenchFailed(f"{name}: {type(error).__name__}: {error}"))
