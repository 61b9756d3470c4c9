"""``seqr bench paper`` from the command line to the report."""

import json
import re
import shutil
from pathlib import Path

import pytest

from seqr.cli import main


def run(data: Path, out: Path, model: Path, *more: str, status: int = 0) -> None:
    options = ["--data", str(data), "--out", str(out), "--model", str(model), "--encoder", str(model)]
    sizes = ["--tasks", "sst2,cola", "--seeds", "1", "--train-rows", "16", "--test-rows", "6", "--workers", "1"]
    sizes += ["--distractors", "30"]
    with pytest.raises(SystemExit) as ended:
        main(["bench", "paper", *options, *sizes, *more])
    assert ended.value.code == status


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_run_writes_every_table_and_figure_and_goes_on_where_it_was(
    data: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(data, out, tiny)
    report = (out / "report.md").read_text("utf-8")
    for heading in (
        "Table 3", "Tables 2 and 4", "Figure 4", "Table 1 and figure 5", "Evidence, part by part",
        "A library that grows", "When the right silo is forbidden", "Figure 6", "whose adapter is withheld",
    ):  # fmt: skip
        assert heading in report
    assert "not whole" not in report and "not measured" not in report
    assert re.search(r"Bar: at least 97% of the oracle beside [\d,]+ distractors: [\d.]+%, \*\*(not )?reached", report)
    figures = sorted(file.name for file in out.glob("*.svg"))
    assert [name[:8] for name in figures] == [f"figure-{number}" for number in (2, 3, 4, 5, 6)]
    results = json.loads((out / "results.json").read_text("utf-8"))
    library = results["extras"]["distractors"]
    assert isinstance(library["sizes"], list)
    for name, one in (("distractors", library), ("regime-seqr-ood", results["extras"]["regime-seqr-ood"])):
        assert "[" not in json.dumps(one["tasks"]), name  # accuracies, not every row's answer
    maximising = results["extras"]["maximising"]
    assert maximising["share"]["seqr"] == maximising["share"]["spectr"] == maximising["share"]["lag 2"] == 1.0
    assert {row["router"] for row in results["table3"]} >= {"seqr", "lag", "arrow", "mu", "lorauter", "oracle", "base"}
    capsys.readouterr()
    run(data, out, tiny)
    assert "train/" not in capsys.readouterr().out
    # Half of it lost, as if it had been stopped there: the report says so, and the rest comes again the same.
    shutil.rmtree(out / "results/answer/lorauter")
    run(data, out, tiny, "--report")
    assert "Not measured: LORAUTER" in (out / "report.md").read_text("utf-8")
    run(data, out, tiny)
    assert json.loads((out / "results.json").read_text("utf-8"))["table3"] == results["table3"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quick", "--full"], "--quick and --full exclude each other"),
        (["--tasks", "sst2,nope"], "there is no task nope; the tasks are ag_news, cola"),
        (["--tasks", "sst2"], "at least two tasks, one seed"),
        (["--workers", "-1"], "--workers must not be negative, got -1"),
        (["--seconds", "-1"], "--seconds must not be negative, got -1"),
        (["--only-seeds", "0,4"], "--only-seeds: there is no seed '4'; the seeds are 0"),
        (["--device", "nope"], "--device nope cannot be used here: "),
        (["--distractors", "0"], "one distractor and 16 tokens are needed"),
        (["--tasks", "sst2,mnli"], "mnli/train.jsonl is not there; --data names a folder"),
        (["--model", "nowhere"], "nowhere is neither a GGUF file nor a directory with a model's config.json"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_starts(
    data: Path, tiny: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(data, out, tiny, *options, status=1)
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_model_without_the_target_modules_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    # GPT-2's attention is made of Conv1D layers, which are no Linears.
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=32, n_positions=16)).save_pretrained(
        tmp_path / "gpt2"
    )
    run(data, tmp_path / "out", tmp_path / "gpt2", status=1)
    assert "has no attention Linear layers that an adapter could be put on" in capsys.readouterr().err


def test_answers_to_other_data_or_options_do_not_mix_in_one_folder(
    data: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(data, out, tiny, "--report")
    other = tmp_path / "other"
    shutil.copytree(data, other)
    lines = (other / "sst2/test.jsonl").read_text("utf-8").splitlines()
    (other / "sst2/test.jsonl").write_text("\n".join(lines[1:]) + "\n", "utf-8")
    run(other, out, tiny, "--report", status=1)
    assert "holds a run with another data; choose another --out" in capsys.readouterr().err
    run(data, out, tiny, "--report", "--test-rows", "5", status=1)
    assert "holds a run with another test_rows;" in capsys.readouterr().err
    run(data, out, tiny, "--report")
