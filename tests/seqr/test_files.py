"""Private files are whole or absent, private from their first byte, and written through no link."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from seqr.files import write_private


@pytest.mark.parametrize("replace", [True, False])
def test_a_private_file_has_mode_0600_whatever_the_umask(tmp_path: Path, replace: bool) -> None:
    before = os.umask(0)
    try:
        write_private(tmp_path / "key", b"secret", replace=replace)
    finally:
        os.umask(before)
    assert (tmp_path / "key").read_bytes() == b"secret"
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["key"]


def test_a_file_left_by_a_killed_run_does_not_lend_its_mode(tmp_path: Path) -> None:
    left = tmp_path / f".key.{os.getpid()}.partial"
    left.write_bytes(b"an older and longer secret")
    left.chmod(0o644)
    write_private(tmp_path / "key", b"secret")
    assert (tmp_path / "key").read_bytes() == b"secret"
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


def test_a_link_in_the_way_is_refused_and_what_it_leads_to_untouched(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"somebody's")
    (tmp_path / f".key.{os.getpid()}.partial").symlink_to(other)
    with pytest.raises(OSError, match="symbolic link"):
        write_private(tmp_path / "key", b"secret")
    assert other.read_bytes() == b"somebody's"
    assert os.listdir(tmp_path) == ["other"]


def test_a_link_at_the_files_own_place_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"somebody's")
    (tmp_path / "key").symlink_to(tmp_path / "other")
    with pytest.raises(FileExistsError):
        write_private(tmp_path / "key", b"secret", replace=False)
    write_private(tmp_path / "key", b"secret")
    assert (tmp_path / "other").read_bytes() == b"somebody's"
    assert not (tmp_path / "key").is_symlink() and (tmp_path / "key").read_bytes() == b"secret"


def test_an_existing_file_stays_where_replacing_is_not_asked_for(tmp_path: Path) -> None:
    write_private(tmp_path / "key", b"first")
    with pytest.raises(FileExistsError):
        write_private(tmp_path / "key", b"second", replace=False)
    assert (tmp_path / "key").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["key"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    write_private(tmp_path / "key", b"first")
    monkeypatch.setattr(os, step, _full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_private(tmp_path / "key", b"second")
    assert (tmp_path / "key").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["key"]


def test_the_file_is_on_the_disk_before_its_name_and_its_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted(name: Callable[[int], str], call: Callable[..., None]) -> Callable[..., None]:
        def run(*arguments: int) -> None:
            order.append(name(arguments[0]))
            call(*arguments)

        return run

    monkeypatch.setattr(os, "fsync", noted(lambda fd: Path(os.readlink(f"/proc/self/fd/{fd}")).name, fsync))
    monkeypatch.setattr(os, "replace", noted(lambda _path: "replace", replace))
    write_private(tmp_path / "key", b"secret")
    assert order == [f".key.{os.getpid()}.partial", "replace", tmp_path.name]


def _full_disk(*_arguments: object) -> None:
    raise OSError(28, "No space left on device")
