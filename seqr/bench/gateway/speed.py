"""The speed section: every engine and every peer on the same prompts, interleaved in one run."""

import gc
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from seqr.bench.errors import BenchPeerMissing
from seqr.bench.gateway import peers
from seqr.bench.gateway.crowd import resident_bytes
from seqr.bench.gateway.engines import FilledEngine, Load, run_streams, start_engine
from seqr.bench.gateway.options import Options
from seqr.bench.gateway.sample import Case, figures, interleave
from seqr.bench.gateway.shelf import bench_plan, prompts, random_columns, speech
from seqr.bench.gateway.telling import crowded
from seqr.bench.gateway.vllm_peer import Vllm
from seqr.bench.routing.memory import measured_bytes
from seqr.library import Library
from seqr.models import load_base_model

MODES = ("prompt_evidence", "evidence", "per_token")
BASE, STATIC = "engine, no adapter resident", "transformers generate, static batch"
ATTRIBUTION_AT = 16


def routed_name(mode: str, count: int) -> str:
    """The name of the case in which every stream may use all ``count`` silos."""
    return f"routed, {mode}, N = {count}"


def base_name(count: int) -> str:
    """The name of the case in which nobody may use any of ``count`` silos."""
    return f"base alone, N = {count}"


async def run_speed(options: Options, notes: list[str], say: Callable[[str], None]) -> dict[str, Any]:
    """All rows, memory and the timing of answers; what could not be measured is added to ``notes``."""
    model, tokenizer = load_base_model(options.model, getattr(torch, options.dtype), "sdpa")
    plan = bench_plan(options.model, model, options.rank, options.dtype)
    say(f"{options.adapters[-1]} adapters are drawn and calibrated")
    z = speech(model, tokenizer, plan)
    vocabulary = int(model.config.get_text_config().vocab_size)
    del model
    load = Load(
        tuple(prompts(options.streams, options.prompt, vocabulary)), options.tokens, options.dtype, options.kv_tokens
    )
    before = resident_bytes_here()
    columns = random_columns(plan, options.adapters[-1], z)
    drawn = resident_bytes_here() - before
    engines: dict[int, FilledEngine] = {}
    vllm: list[Vllm] = []
    try:
        for count in (0, *options.adapters):
            say(f"the engine with {count} adapters starts")
            engines[count] = await start_engine(options.model, plan, columns[:count], load)
        cases = _engine_cases(engines, load) + _peer_cases(options, plan, load, notes, say, vllm)
        samples = await interleave(cases, options.rounds, say)
        report = {
            "speed": [figures(case, samples) for case in cases],
            "memory": _memory(Library(plan, columns), drawn),
            "telling": await _answers(engines, load, options),
        }
    finally:
        for engine in engines.values():
            await engine.stop()
        for one in vllm:
            one.close()
    return report


def resident_bytes_here() -> int:
    """Resident bytes of this process, after what is no longer needed has gone."""
    gc.collect()
    return resident_bytes(os.getpid())


def _engine_cases(engines: dict[int, FilledEngine], load: Load) -> list[Case]:
    nobody = frozenset[Any]()
    cases = [Case(BASE, 0, partial(run_streams, engines[0], load, nobody, "per_token"), STATIC)]
    for count, engine in engines.items():
        if count == 0:
            continue
        keys, base = frozenset(engine.info().adapters), base_name(count)
        cases.append(Case(base, count, partial(run_streams, engine, load, nobody, "per_token"), BASE))
        for mode in MODES:
            run = partial(run_streams, engine, load, keys, mode)
            cases.append(Case(routed_name(mode, count), count, run, base))
        if count == min(engines, key=lambda n: abs(n - ATTRIBUTION_AT)):
            name = routed_name(MODES[0], count)
            run = partial(run_streams, engine, load, keys, MODES[0], True)
            cases.append(Case(f"{name}, with attribution", count, run, name))
    return cases


def _peer_cases(
    options: Options, plan: Any, load: Load, notes: list[str], say: Callable[[str], None], vllm: list[Vllm]
) -> list[Case]:
    say("the peers are loaded")
    cases = [Case(STATIC, 0, peers.plain(options.model, load).run)]
    for count in options.adapters:
        if count > options.peft_most:
            notes.append(f"peft's Arrow with {count} adapters: it stacks all of them again in every call (--peft-most)")
            continue
        try:
            say(f"peft's Arrow with {count} adapters is made")
            cases.append(
                Case(f"peft Arrow, N = {count}", count, peers.arrow(options.model, plan, count, load).run, STATIC)
            )
        except BenchPeerMissing as missing:
            notes.append(str(missing))
    if options.vllm_python is None:
        notes.append("vLLM: no Python that has it was given (--vllm-python)")
        return cases
    try:
        vllm.append(Vllm(options.vllm_python, options.model, load))
        cases.append(Case("vLLM without LoRA", 0, vllm[0].run, STATIC))
    except BenchPeerMissing as missing:
        notes.append(str(missing))
    return cases


def _memory(library: Library, drawn: int) -> dict[str, Any]:
    count = len(library.silos)
    return {
        "adapters": count,
        "tensor bytes per adapter": measured_bytes(library) / count,
        "resident bytes per adapter": drawn / count,
    }


async def _answers(engines: dict[int, FilledEngine], load: Load, options: Options) -> list[dict[str, Any]]:
    """The user of the smallest library's silos, in the smallest library and in each larger one."""
    smallest, *larger = options.adapters
    keys = frozenset(engines[smallest].info().adapters)
    return [
        await crowded(engines[smallest], engines[count], load, keys, options.answers, (smallest, count))
        for count in larger
    ]


def bars(rows: Sequence[dict[str, Any]], adapters: Sequence[int]) -> list[dict[str, Any]]:
    """The rows beside their bars: routed over base at N = 16 and 1,024, the engine over ``generate``."""
    speed = {row["case"]: row for row in rows}
    held = []
    for count, bar in ((16, 0.80), (1024, 0.70)):
        for mode in MODES if count in adapters else ():
            row = speed[routed_name(mode, count)]
            held.append({"what": f"{row['case']}, of base", "bar": bar, "measured": row["ratio"]})
    held.append({"what": f"{BASE}, of {STATIC}", "bar": 0.90, "measured": speed[BASE]["ratio"]})
    return [one | {"met": one["measured"] >= one["bar"]} for one in held]
