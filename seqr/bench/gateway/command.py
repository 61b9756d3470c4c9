"""``seqr bench gateway``: which sections to run, on which model, and where the report goes."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from seqr.bench.base_model import model_directory
from seqr.bench.errors import BenchPeerMissing
from seqr.bench.gateway.options import Options, check, sizes
from seqr.bench.machine import describe_machine
from seqr.smollm2 import default_cache_dir

_NEEDED = "this benchmark runs the gateway: pip install '.[gateway,bench]'"
_DTYPE = "bfloat16 or float32, the default: most processors have no instructions for bfloat16 and are slow with it."
_ANSWERS = "Answers, and ten times as many refusals, that are timed; 0 leaves this out. It takes minutes."


def gateway(
    out: Annotated[Path, typer.Option(help="Where gateway.json and gateway.md go.")] = Path("bench-gateway"),
    model: Annotated[str, typer.Option(help="Base model: a directory or .gguf file; default SmolLM2-135M.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Few, short and small: to see that it runs.")] = False,
    speed: Annotated[bool, typer.Option("--speed", help="Engine and peers, and what answers tell: default.")] = False,
    load: Annotated[bool, typer.Option("--load", help="200 streams for 5 minutes over HTTP, and refusals.")] = False,
    adapters: Annotated[str, typer.Option(help="Library sizes, comma-separated.")] = "3,16,64,1024",
    streams: Annotated[int, typer.Option(help="Concurrent streams of --speed.")] = 16,
    prompt: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 60,
    tokens: Annotated[int, typer.Option(help="Generated tokens of each stream.")] = 32,
    rounds: Annotated[int, typer.Option(help="Rounds of --speed that count.")] = 5,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
    dtype: Annotated[str, typer.Option(help=_DTYPE)] = "float32",
    peft_most: Annotated[int, typer.Option(help="The largest library that peft's Arrow is measured with.")] = 64,
    vllm_python: Annotated[Path | None, typer.Option(help="A Python that has vLLM, to measure it too.")] = None,
    answers: Annotated[int, typer.Option(help=_ANSWERS)] = 30,
    load_streams: Annotated[int, typer.Option(help="Concurrent streams of --load.")] = 200,
    load_seconds: Annotated[float, typer.Option(help="How long --load lasts.")] = 300.0,
    threads: Annotated[int, typer.Option(help="Processor threads; 0 leaves the choice to torch.")] = 0,
) -> None:
    """Tokens per second of the gateway's engine beside its peers, and a crowd against a served gateway."""
    options = Options(
        Path(model), sizes(adapters), streams, prompt, tokens, rounds, rank, dtype, peft_most, vllm_python, answers,
        load_streams, load_seconds,
    )  # fmt: skip
    check(options, threads)
    options = replace(options, model=model_directory(model, default_cache_dir()))
    if quick:
        options = options.quick()
    torch.set_num_threads(threads or torch.get_num_threads())
    start, notes = time.perf_counter(), list[str]()
    report: dict[str, Any] = {"machine": describe_machine(), "notes": notes}
    told = ("dtype", "streams", "prompt", "tokens", "rank", "rounds")
    report["workload"] = {name: getattr(options, name) for name in told} | {"model": options.model.name}
    try:
        if speed or not load:
            report |= _speed(options, notes)
        if load:
            crowd, told_by_refusals = _load(options)
            report["crowd"] = crowd
            if told_by_refusals:
                report["telling"] = [*report.get("telling", ()), told_by_refusals]
        if not options.answers:
            notes.append("what the clock tells (--answers 0)")
    except ModuleNotFoundError as missing:
        raise BenchPeerMissing(f"{_NEEDED} ({missing.name} is missing)") from None
    flags = {"--quick": quick, "--speed": speed, "--load": load}
    report["command"] = " ".join(["seqr bench gateway", *(flag for flag, given in flags.items() if given)])
    report["seconds"] = time.perf_counter() - start
    from seqr.bench.gateway.report import write_report

    for path in write_report(report, out):
        typer.echo(str(path))
    if report.get("crowd", {}).get("errors"):
        raise typer.Exit(1)


def _speed(options: Options, notes: list[str]) -> dict[str, Any]:
    from seqr.bench.gateway.speed import bars, run_speed

    report = asyncio.run(run_speed(options, notes, _say))
    return report | {"bars": bars(report["speed"], options.adapters)}


def _load(options: Options) -> tuple[dict[str, Any], dict[str, Any] | None]:
    from seqr.bench.gateway.crowd import run_crowd
    from seqr.bench.gateway.telling import refusals

    crowd = run_crowd(options, _say)
    return crowd, refusals(options, _say) if options.answers else None


def _say(line: str) -> None:
    typer.echo(line, err=True)
