"""A benchmark's child answers what it is asked, tells errors in their own words, and never outlives its parent."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from seqr.bench.errors import BenchFailed, BenchPeerMissing
from seqr.bench.gateway.child import Build, Child
from seqr.errors import SeqrError


class Counter:
    def __init__(self, start: int):
        self.value = start

    async def add(self, amount: int) -> tuple[int, int]:
        self.value += amount
        return self.value, os.getpid()

    async def fail(self) -> None:
        raise BenchFailed("a stream of the benchmark failed")

    async def break_down(self) -> None:
        raise ValueError("two halves")

    async def leave(self) -> None:
        os._exit(3)

    async def be_killed(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    async def be_busy(self) -> None:
        time.sleep(600)


async def counter(start: int) -> Counter:
    return Counter(start)


async def absent() -> None:
    raise BenchPeerMissing("peft's Arrow was not measured: it is not there")


def ask(*methods: str, build: Build = counter, args: tuple[Any, ...] = (1,)) -> None:
    async def go() -> None:
        with closing(Child("the counter", build, *args)) as child:
            await child.ready()
            for method in methods:
                await child.ask(method)

    asyncio.run(go())


def test_each_child_is_a_process_that_keeps_what_it_built() -> None:
    async def go() -> list[tuple[int, int]]:
        with closing(Child("one", counter, 1)) as one, closing(Child("ten", counter, 10)) as ten:
            found = []
            for child in (one, ten):
                await child.ready()
                found.append(await child.ask("add", 5))
            assert {pid for _, pid in found} == {one.pid, ten.pid} and os.getpid() not in (one.pid, ten.pid)
            return [*found, await one.ask("add", 5)]

    assert [value for value, _ in asyncio.run(go())] == [6, 15, 11]


@pytest.mark.parametrize(
    ("methods", "kind", "said"),
    [
        (["fail"], BenchFailed, "a stream of the benchmark failed"),
        (["break_down"], BenchFailed, "the counter: ValueError: two halves"),
        (["leave"], BenchFailed, "the counter: its process ended with status 3"),
        (
            ["be_killed"],
            BenchFailed,
            "the counter: its process was ended by SIGKILL, most often because memory ran out",
        ),
    ],
)
def test_what_goes_wrong_in_a_child_is_raised_in_its_words(
    methods: list[str], kind: type[SeqrError], said: str
) -> None:
    with pytest.raises(kind) as raised:
        ask(*methods)
    assert str(raised.value) == said


def test_what_cannot_be_built_is_told_when_it_is_waited_for() -> None:
    with pytest.raises(BenchPeerMissing, match="peft's Arrow was not measured: it is not there"):
        ask(build=absent, args=())
    with pytest.raises(BenchFailed, match="the counter: TypeError: counter"):
        ask(build=counter, args=())


def test_a_child_that_has_ended_cannot_be_asked_again() -> None:
    async def go() -> None:
        with closing(Child("the counter", counter, 1)) as child:
            await child.ready()
            with pytest.raises(BenchFailed, match="a stream"):
                await child.ask("fail")
            with pytest.raises(BenchFailed, match="the counter: its process ended with status 0"):
                await child.ask("add", 1)

    asyncio.run(go())


def test_a_closed_child_is_gone_even_while_it_is_busy() -> None:
    async def go() -> int:
        with closing(Child("the counter", counter, 1)) as child:
            await child.ready()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(child.ask("be_busy"), 0.1)
            return child.pid or 0

    assert is_gone(asyncio.run(go()))


PARENT = """
import asyncio, signal
from contextlib import closing
from seqr.bench.gateway.child import Child
from tests.seqr.bench.test_bench_child import counter
async def go():
    with closing(Child("the counter", counter, 1)) as child:
        await child.ready()
        print(child.pid, flush=True)
        await child.ask("be_busy")
signal.signal(signal.SIGINT, signal.default_int_handler)  # it may have been started by somebody who ignores Ctrl-C
asyncio.run(go())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_child_ends_with_its_parent_however_that_one_ends(number: signal.Signals) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        start_new_session=True,
    )
    assert parent.stdout is not None and parent.stderr is not None
    line = parent.stdout.readline()
    pid = int(line or pytest.fail(parent.stderr.read()))
    # Ctrl-C reaches the whole group.
    os.killpg(parent.pid, number) if number == signal.SIGINT else parent.send_signal(number)
    _, said = parent.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while not is_gone(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert is_gone(pid)
    assert "the counter" not in said  # only the parent may have said that it was interrupted


def is_gone(pid: int) -> bool:
    """No process, or one that only waits for its status to be read."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
