"""The run as a list of units, each finished once and kept: any number of processes may work through it together."""

import fcntl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

Report = Callable[[str], None]


@dataclass(frozen=True)
class Unit:
    """One piece of work: done when ``done()`` says so, which ``work()`` brings about.

    cost: how long it takes beside others, in tokens of a forward pass. after: names of units it needs. preparation:
    worth doing only for a unit that needs it.
    """

    name: str
    cost: float
    done: Callable[[], bool]
    work: Callable[[], None]
    after: tuple[str, ...] = ()
    preparation: bool = False


@contextmanager
def claimed(folder: Path, name: str) -> Iterator[bool]:
    """Whether this process is the one to do ``name``; the claim ends with the block, or with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name.replace('/', '.')}.claim").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def work_through(
    units: Sequence[Unit], claims: Path, report: Report, pause: float = 0.5, until: float | None = None
) -> None:
    """Do every unit that is wanted and not done, in order, leaving out what other processes are at and coming back.

    Each line of ``report`` has what was done, how long it took and how long the rest may take at this pace. until: the
    time, as ``time.time`` gives it, after which no unit is begun.
    """
    began, spent = time.monotonic(), 0.0
    while left := wanted(units):
        waiting = {unit.name for unit in left}
        ready = [unit for unit in left if not waiting & set(unit.after)]
        for unit in ready:
            if until is not None and time.time() >= until:
                return
            with claimed(claims, unit.name) as mine:
                if not mine or unit.done():
                    continue
                start = time.monotonic()
                unit.work()
                took = time.monotonic() - start
            spent += unit.cost
            rest = sum(other.cost for other in wanted(units))
            pace = (time.monotonic() - began) / max(spent, 1e-9)
            report(f"{unit.name}  {took:.0f} s  ({_left(rest * pace)} left in this process's pace)")
            break
        else:
            time.sleep(pause)


def wanted(units: Sequence[Unit]) -> list[Unit]:
    """The units that are not done, in order, without preparations that no other one of them needs."""
    left = {unit.name: unit for unit in units if not unit.done()}
    keep: set[str] = set()
    open_ = [unit for unit in left.values() if not unit.preparation]
    while open_:
        unit = open_.pop()
        if unit.name not in keep:
            keep.add(unit.name)
            open_ += [left[name] for name in unit.after if name in left]
    return [unit for unit in left.values() if unit.name in keep]


def _left(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"
