"""A run that is killed goes on, and processes that share one do nothing twice."""

import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path

from seqr.bench.paper.units import Unit, claimed, work_through


def units_of(folder: Path, names: str = "abcdef") -> list[Unit]:
    def work(name: str) -> None:
        with (folder / "log").open("a") as log:
            log.write(f"{name} {os.getpid()}\n")
        (folder / name).touch()

    return [
        Unit(n, 1.0, (folder / n).exists, lambda n=n: work(n), tuple(names[i - 1 : i]))  # type: ignore[misc]
        for i, n in enumerate(names)
    ]


def in_process(folder: Path) -> None:
    work_through(units_of(folder), folder / "claims", lambda _line: None, pause=0.01)


def done(folder: Path) -> list[str]:
    return [line.split()[0] for line in (folder / "log").read_text().splitlines()]


def test_units_are_done_in_an_order_that_gives_each_what_it_needs(tmp_path: Path) -> None:
    backwards = units_of(tmp_path)[::-1]
    work_through(backwards, tmp_path / "claims", lambda _line: None)
    assert done(tmp_path) == list("abcdef")


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    (tmp_path / "b").touch()
    work_through(units_of(tmp_path), tmp_path / "claims", lambda _line: None)
    assert done(tmp_path) == list("cdef")


def test_processes_share_a_run_and_do_nothing_twice(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=in_process, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert sorted(done(tmp_path)) == list("abcdef")


def test_a_claim_keeps_others_out_and_ends_with_its_block(tmp_path: Path) -> None:
    with claimed(tmp_path, "x") as mine, claimed(tmp_path, "x") as again:
        assert mine and not again
    with claimed(tmp_path, "x") as mine:
        assert mine


def test_a_preparation_is_done_only_for_a_unit_that_needs_it(tmp_path: Path) -> None:
    a, b, c, *_ = units_of(tmp_path)
    (tmp_path / "c").touch()
    units = [replace(a, preparation=True), replace(b, preparation=True), c]
    work_through(units, tmp_path / "claims", lambda _line: None)
    assert not (tmp_path / "log").exists()
    (tmp_path / "c").unlink()
    work_through(units, tmp_path / "claims", lambda _line: None)
    assert done(tmp_path) == list("abc")


def test_nothing_is_begun_after_the_time_is_over(tmp_path: Path) -> None:
    work_through(units_of(tmp_path), tmp_path / "claims", lambda _line: None, until=time.time() - 1)
    assert not (tmp_path / "log").exists()


def test_every_line_says_what_is_left(tmp_path: Path) -> None:
    lines: list[str] = []
    work_through(units_of(tmp_path, "ab"), tmp_path / "claims", lines.append)
    assert len(lines) == 2 and all("left" in line for line in lines)
