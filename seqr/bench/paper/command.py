"""``seqr bench paper``: which run, on which data, where to; work is shared among processes that each keep results."""

import json
import multiprocessing
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from seqr.bench.base_model import model_directory
from seqr.bench.errors import BenchFolderTaken, BenchInterrupted, BenchOptionInvalid
from seqr.bench.paper.merging import take_over
from seqr.canonical import canonical_json, sha256_hex
from seqr.smollm2 import default_cache_dir

if TYPE_CHECKING:
    from seqr.bench.paper.workbench import Settings, Workbench

RUN_NOTE = "run.json"
QUICK_TASKS = ("sst2", "ag_news", "dbpedia_14")


@dataclass(frozen=True)
class Run:
    """What every process of a run needs to know."""

    model: Path
    data: Path
    out: Path
    adapters: Path
    settings: "Settings"
    every: bool
    threads: int
    device: str
    seeds: tuple[int, ...] = ()
    until: float | None = None


def paper(
    data: Annotated[Path, typer.Option(help="Folder with <task>/train.jsonl and <task>/test.jsonl.")] = Path(
        "../shared/data/paper"
    ),
    out: Annotated[Path, typer.Option(help="Where results and the report go; a run stopped there goes on.")] = Path(
        "bench-paper"
    ),
    model: Annotated[str, typer.Option(help="Base model: a directory or .gguf file; default SmolLM2-135M.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Three tasks, one seed, 100 and 60 rows: minutes.")] = False,
    full: Annotated[bool, typer.Option("--full", help="The paper's 1,000 training and 1,000 test rows.")] = False,
    tasks: Annotated[str, typer.Option(help="Comma-separated tasks instead of all.")] = "",
    seeds: Annotated[int, typer.Option(help="How many training seeds.")] = 0,
    train_rows: Annotated[int, typer.Option(help="Training rows per task.")] = 0,
    test_rows: Annotated[int, typer.Option(help="Test rows per task.")] = 0,
    distractors: Annotated[int, typer.Option(help="Adapters of nobody that the library grows by.")] = 1500,
    encoder: Annotated[str, typer.Option(help="sentence-transformers model for LORAUTER.")] = "",
    workers: Annotated[int, typer.Option(help="Processes; 0 for one per core, at most 8.")] = 0,
    device: Annotated[str, typer.Option(help="Where to train and measure: cpu, cuda, cuda:1.")] = "cpu",
    every: Annotated[bool, typer.Option("--every", help="What explains, for every seed, as with --full.")] = False,
    only_seeds: Annotated[str, typer.Option(help="Which of the run's seeds, in which order: 1,2,0.")] = "",
    seconds: Annotated[int, typer.Option(help="Begin nothing new after so long; the same command goes on.")] = 0,
    take: Annotated[Path | None, typer.Option(help="Take over results from this folder of the same run.")] = None,
    report_only: Annotated[bool, typer.Option("--report", help="Only write the report of what is there.")] = False,
) -> None:
    """Reproduce the SEQR paper's experiments and compare every router on the same adapters.

    The standard run has ten tasks, three seeds, 400 training and 200 test rows. Writes results.json, report.md and
    figures to --out; adapters are cached and shared by runs.
    """
    if quick and full:
        raise BenchOptionInvalid("--quick and --full exclude each other")
    began = time.time()
    for name, value in (("workers", workers), ("seconds", seconds)):
        if value < 0:
            raise BenchOptionInvalid(f"--{name} must not be negative, got {value}")
    if not report_only:
        _check_device(device)
    from seqr.bench.paper.tasks import known_tasks
    from seqr.bench.paper.workbench import Settings
    from seqr.models import inspect_base_model

    cache = default_cache_dir()
    count = workers or min(8, os.cpu_count() or 1)
    rows = (100, 60) if quick else (1000, 1000) if full else (400, 200)
    settings = Settings(
        tasks=tuple(tasks.split(",")) if tasks else QUICK_TASKS if quick else tuple(known_tasks()),
        seeds=tuple(range(seeds or (1 if quick else 3))),
        train_rows=train_rows or rows[0],
        test_rows=test_rows or rows[1],
        max_tokens=256 if full else 96,
        distractors=distractors,
        encoder=encoder,
    )
    threads = max(1, (os.cpu_count() or 1) // count)
    run = Run(
        model_directory(model, cache), data, out, cache / "bench/adapters", settings, every or full, threads, device,
        _some_seeds(only_seeds, settings.seeds), began + seconds if seconds else None,
    )  # fmt: skip
    # Before any process is started: what is wrong with data, model or folder is said once.
    data_digest = _check_data(run)
    digest = inspect_base_model(run.model, "attention").digest
    identity = {"model": digest, "data": data_digest} | asdict(settings)
    if take is not None:
        check_folder(take, identity, "choose another folder for --take, or repeat that run's options")
        _check_named(take)
    claim_folder(out, identity)
    if take is not None:
        take_over(take, out, run.seeds, settings.seeds[0], print)
    if not report_only:
        _work_together(run, count)
    from seqr.bench.paper.report import write_report

    print(f"report: {write_report(bench_of(run), out)}")


def claim_folder(out: Path, identity: dict[str, Any]) -> None:
    """Make ``out`` the folder of one run, or raise ``BenchFolderTaken``: answers to other questions must not mix."""
    note = out / RUN_NOTE
    if not note.exists():
        out.mkdir(parents=True, exist_ok=True)
        note.write_bytes(canonical_json(identity))
    check_folder(out, identity, "choose another --out, or repeat that run's options")


def check_folder(folder: Path, identity: dict[str, Any], advice: str) -> None:
    """Raise ``BenchFolderTaken`` unless ``folder`` is that of a run on this data and model with these options."""
    try:
        theirs = json.loads((folder / RUN_NOTE).read_bytes())
    except (OSError, ValueError):
        raise BenchFolderTaken(f"{folder} is no folder of a run: it has no {RUN_NOTE} that can be read") from None
    differs = [key for key, value in json.loads(canonical_json(identity)).items() if theirs.get(key) != value]
    if differs:
        raise BenchFolderTaken(f"{folder} holds a run with another {', '.join(differs)}; {advice}")


def _check_named(folder: Path) -> None:
    """Raise ``BenchFolderTaken`` for a GPU's results of a version that did not write the GPU's name into each."""
    device = json.loads((folder / RUN_NOTE).read_bytes()).get("device", "cpu")
    if device != "cpu":
        raise BenchFolderTaken(f"{folder} does not say result by result what it was measured on: {device}")


def bench_of(run: Run) -> "Workbench":
    """The workbench of a run, with its model loaded."""
    from seqr.bench.paper.store import Store
    from seqr.bench.paper.workbench import Workbench

    return Workbench(run.model, run.data, Store(run.adapters, run.out / "results"), run.settings)


def work(run: Run) -> None:
    """One process's part of a run, until nothing is left."""
    import torch

    from seqr.bench.paper.plan import Plan
    from seqr.bench.paper.units import work_through

    with torch.device(run.device):
        units = Plan(bench_of(run), run.every, run.seeds).units()
        work_through(units, run.out / "claims", _done, until=run.until)


def _done(line: str) -> None:
    import torch

    _say(line)
    torch.cuda.empty_cache()  # several processes may share a card; without one it does nothing


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)


def _work_in_child(run: Run) -> None:
    import torch

    torch.set_num_threads(run.threads)
    work(run)


def _work_together(run: Run, count: int) -> None:
    if count == 1:
        work(run)
        return
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_work_in_child, args=(run,)) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join()
    except KeyboardInterrupt:
        for process in processes:
            process.terminate()
        raise
    if any(process.exitcode for process in processes):
        raise BenchInterrupted(
            f"a process of the run failed; what is finished is in {run.out}, the same command goes on"
        )


def _some_seeds(only: str, seeds: tuple[int, ...]) -> tuple[int, ...]:
    """The seeds named in ``only``, in that order, all where it is empty. Raises ``BenchOptionInvalid``."""
    chosen = only.split(",") if only else [str(seed) for seed in seeds]
    known = {str(seed): seed for seed in seeds}
    if unknown := [name for name in chosen if name not in known]:
        raise BenchOptionInvalid(f"--only-seeds: there is no seed {unknown[0]!r}; the seeds are {', '.join(known)}")
    return tuple(known[name] for name in chosen)


def _check_device(device: str) -> None:
    """Raise ``BenchOptionInvalid`` for a device that cannot be used."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BenchOptionInvalid(f"--device {device} cannot be used here: {reason}") from None


def _check_data(run: Run) -> str:
    """SHA-256 over the rows of every task and split; raises what ``read_rows`` raises."""
    from seqr.bench.paper.tasks import SPLITS, read_rows

    return sha256_hex(canonical_json([read_rows(run.data, t, split) for t in run.settings.tasks for split in SPLITS]))
