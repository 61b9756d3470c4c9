"""One run shared by machines: each does its seeds, one takes over the other's results, and the report names both."""

import json
import shutil
import time
from pathlib import Path

import pytest

from seqr.bench.errors import BenchAdapterMissing
from seqr.bench.paper import workbench
from seqr.bench.paper.store import Store
from seqr.bench.paper.training import Recipe
from seqr.bench.paper.workbench import Settings, Workbench, training_name
from seqr.cli import main


def run(data: Path, model: Path, out: Path, *more: str, status: int = 0) -> None:
    options = ["--data", str(data), "--out", str(out), "--model", str(model), "--encoder", str(model)]
    sizes = ["--tasks", "sst2,cola", "--seeds", "2", "--train-rows", "8", "--test-rows", "4", "--workers", "1"]
    with pytest.raises(SystemExit) as ended:
        main(["bench", "paper", *options, *sizes, "--distractors", "12", *more])
    assert ended.value.code == status


def on_another_machine(folder: Path, name: str) -> None:
    """What a run has said about its device, said of another one."""
    for file in (folder / "results").rglob("*.json"):
        value = json.loads(file.read_bytes())
        if isinstance(value, dict) and "device" in value:
            file.write_text(json.dumps(value | {"device": name}), "utf-8")


@pytest.fixture(scope="module")
def begun(data: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A machine's folder with the first seed done, ``out``, beside the ``cache`` that its adapters are in."""
    machine = tmp_path_factory.mktemp("machine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(machine / "cache"))
        run(data, tiny, machine / "out", "--only-seeds", "0")
    return machine


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return monkeypatch


def test_seeds_done_on_two_machines_become_one_report_that_names_both(
    data: Path, tiny: Path, tmp_path: Path, caches: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], begun: Path
) -> None:
    here, there = tmp_path / "out", tmp_path / "there"
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    assert "measured for 1 of 2 seeds" in (here / "report.md").read_text("utf-8")
    caches.setenv("XDG_CACHE_HOME", str(tmp_path / "their-cache"))
    run(data, tiny, there, "--only-seeds", "1", "--every")
    on_another_machine(there, "Some GPU")
    capsys.readouterr()
    # Their adapters and arrays stay where they are: what is finished needs them no more.
    shutil.rmtree(tmp_path / "their-cache")
    for arrays in (there / "results").rglob("*.safetensors"):
        arrays.unlink()
    caches.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run(data, tiny, here, "--take", str(there), "--report")
    assert "seed 0: nothing there" in (printed := capsys.readouterr().out)
    assert "seed 1: " in printed and "files taken" in printed
    report = (here / "report.md").read_text("utf-8")
    assert "seed 0 trained and measured on a CPU; seed 1 trained and measured on one Some GPU" in report
    assert "not whole" not in report
    table = json.loads((here / "results.json").read_text("utf-8"))["table3"]
    assert {row["router"]: row["seeds"] for row in table} == {
        **dict.fromkeys(("base", "mu", "arrow", "lag", "seqr", "seqr_public", "evidence", "lorauter"), 2),
        **dict.fromkeys(("even_evidence", "early_evidence", "prompt_evidence", "oracle"), 2),
    }
    # The run goes on from there, and neither trains nor reads anything again.
    run(data, tiny, here)
    assert not (here / "results/read/1").exists()
    assert "train/" not in capsys.readouterr().out


def test_a_seed_begun_here_with_other_adapters_is_not_mixed_with_theirs(
    data: Path, tiny: Path, tmp_path: Path, caches: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], begun: Path
) -> None:
    here, there = tmp_path / "out", tmp_path / "there"
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    shutil.copytree(here, there)
    answers = sorted((here / "results/answer/seqr/0").glob("*.json"))
    answers[0].unlink()
    capsys.readouterr()
    run(data, tiny, here, "--take", str(there), "--only-seeds", "0", "--report")
    assert "seed 0: 1 files taken" in capsys.readouterr().out and answers[0].exists()
    record = there / "results/train/0/sst2/shared.json"
    record.write_text(json.dumps(json.loads(record.read_bytes()) | {"adapter": "f" * 32}), "utf-8")
    answers[0].unlink()
    run(data, tiny, here, "--take", str(there), "--only-seeds", "0", "--report")
    assert "seed 0: left out, it was begun here with other adapters" in capsys.readouterr().out
    assert not answers[0].exists()


def test_only_a_folder_of_the_same_run_is_taken_from(
    data: Path, tiny: Path, tmp_path: Path, caches: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(data, tiny, tmp_path / "out", "--take", str(tmp_path / "none"), "--report", status=1)
    assert "none is no folder of a run: it has no run.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    run(data, tiny, tmp_path / "other", "--report", "--test-rows", "3")
    run(data, tiny, tmp_path / "out", "--take", str(tmp_path / "other"), "--report", status=1)
    assert "other holds a run with another test_rows; choose another folder for --take" in capsys.readouterr().err


def test_results_that_do_not_name_their_gpu_are_not_taken(
    data: Path, tiny: Path, tmp_path: Path, caches: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(data, tiny, tmp_path / "old", "--report")
    note = tmp_path / "old/run.json"
    note.write_text(json.dumps(json.loads(note.read_bytes()) | {"device": "Some GPU"}), "utf-8")
    run(data, tiny, tmp_path / "out", "--take", str(tmp_path / "old"), "--report", status=1)
    assert "does not say result by result what it was measured on: Some GPU" in capsys.readouterr().err


def test_after_its_seconds_a_run_begins_nothing_new_and_goes_on_the_next_time(
    data: Path, tiny: Path, tmp_path: Path, caches: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, clock = tmp_path / "out", iter(range(10_000))
    real = time.time
    # Every look at the clock takes a second: a budget of ten lets some units begin, and not all.
    caches.setattr(time, "time", lambda: real() + next(clock) * 1.0)
    run(data, tiny, out, "--seconds", "10", "--only-seeds", "1")
    some = set((out / "results").rglob("*.json"))
    assert "not whole" in (out / "report.md").read_text("utf-8")
    caches.setattr(time, "time", real)
    run(data, tiny, out, "--only-seeds", "1")
    assert set((out / "results").rglob("*.json")) > some
    assert len(list((out / "results/answer/lorauter/1").glob("*.json"))) == 2


def test_an_adapter_that_was_not_brought_along_is_named(
    data: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(("sst2", "cola"), (0,), 8, 4, 96, Recipe(rank=4), encoder=str(tiny))
    store = Store(tmp_path / "adapters", tmp_path / "results")
    bench = Workbench(tiny, data, store, settings)
    store.keep(training_name("sst2", 0, True), {"adapter": "a" * 32, "device": "Some GPU"})
    with pytest.raises(BenchAdapterMissing) as refused:
        bench.adapter("sst2", 0, True)
    assert str(refused.value) == (
        f"the adapter of sst2, seed 0, was trained on Some GPU and is not here: copy {'a' * 32}.safetensors to "
        f"{tmp_path / 'adapters'}, or leave the seed out with --only-seeds"
    )
    # Where it was trained, it is trained again.
    monkeypatch.setattr(workbench, "device_name", lambda: "Some GPU")
    assert set(bench.adapter("sst2", 0, True)) == set(bench.modules)
    assert bench.is_trained("sst2", 0, True)
