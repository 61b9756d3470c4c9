"""The speed section: every engine and every peer on the same prompts, interleaved in one run."""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from seqr.bench.errors import BenchPeerMissing
from seqr.bench.gateway import peers
from seqr.bench.gateway.child import Build, Child
from seqr.bench.gateway.engines import Load, start_engine
from seqr.bench.gateway.options import Options
from seqr.bench.gateway.sample import Case, figures, interleave
from seqr.bench.gateway.shelf import bench_plan, prompts
from seqr.bench.gateway.telling import crowded
from seqr.bench.gateway.vllm_peer import Vllm
from seqr.models import load_base_model
from seqr.plan import Plan

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
    model, _ = load_base_model(options.model, getattr(torch, options.dtype), "sdpa")
    plan = bench_plan(options.model, model, options.rank, options.dtype)
    asked = tuple(prompts(options.streams, options.prompt, int(model.config.get_text_config().vocab_size)))
    del model
    load = Load(asked, options.tokens, options.dtype, options.kv_tokens)
    with ExitStack() as stack:
        contenders = _Contenders(options, plan, load, notes, say, stack)
        engines = await contenders.engines()
        cases = _engine_cases(engines) + await contenders.peers()
        samples = await interleave(cases, options.rounds, say)
        report = {
            "speed": [figures(case, samples) for case in cases],
            "memory": await engines[options.adapters[-1]].ask("memory"),
        }
        if options.answers:
            report["telling"] = await _answers(engines, options, say)
    return report


class _Contenders:
    """What is measured, each in a process of its own that ends with ``stack``."""

    def __init__(
        self,
        options: Options,
        plan: Plan,
        load: Load,
        notes: list[str],
        say: Callable[[str], None],
        stack: ExitStack,
    ):
        self._options = options
        self._plan = plan
        self._load = load
        self._notes = notes
        self._say = say
        self._stack = stack
        self._threads = torch.get_num_threads()

    async def engines(self) -> dict[int, Child]:
        """By the number of resident adapters, first the one without any."""
        given = self._options.model, self._plan, self._load
        return {
            count: await self._child(f"the engine with {count} adapters", start_engine, *given, count, self._threads)
            for count in (0, *self._options.adapters)
        }

    async def peers(self) -> list[Case]:
        """Those that can be measured."""
        path, load = self._options.model, self._load
        static = await self._child(STATIC, peers.plain, path, load, self._threads)
        cases = [Case(STATIC, 0, partial(static.ask, "run"))]
        scratch = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        for count in self._options.adapters:
            if count > self._options.peft_most:
                why = "it stacks all of them again in every call (--peft-most)"
                self._notes.append(f"peft's Arrow with {count} adapters: {why}")
                continue
            name = f"peft Arrow, N = {count}"
            try:
                arrow = await self._child(name, peers.arrow, path, self._plan, load, count, self._threads, scratch)
                cases.append(Case(name, count, partial(arrow.ask, "run"), STATIC))
            except BenchPeerMissing as missing:
                self._notes.append(str(missing))
        return cases + await self._vllm()

    async def _vllm(self) -> list[Case]:
        python = self._options.vllm_python
        if python is None:
            self._notes.append("vLLM: no Python that has it was given (--vllm-python)")
            return []
        try:
            vllm = self._stack.enter_context(closing(Vllm(python, self._options.model, self._load, self._threads)))
        except BenchPeerMissing as missing:
            self._notes.append(str(missing))
            return []
        return [Case("vLLM without LoRA", 0, vllm.run, STATIC)]

    async def _child(self, name: str, build: Build, *args: Any) -> Child:
        self._say(f"{name} starts")
        child = self._stack.enter_context(closing(Child(name, build, *args)))
        await child.ready()
        return child


def _engine_cases(engines: dict[int, Child]) -> list[Case]:
    cases = [Case(BASE, 0, partial(engines[0].ask, "run", 0, "per_token"), STATIC)]
    for count, engine in engines.items():
        if count == 0:
            continue
        base = base_name(count)
        cases.append(Case(base, count, partial(engine.ask, "run", 0, "per_token"), BASE))
        for mode in MODES:
            cases.append(Case(routed_name(mode, count), count, partial(engine.ask, "run", count, mode), base))
        if count == min(engines, key=lambda n: abs(n - ATTRIBUTION_AT)):
            name = routed_name(MODES[0], count)
            run = partial(engine.ask, "run", count, MODES[0], True)
            cases.append(Case(f"{name}, with attribution", count, run, name))
    return cases


async def _answers(engines: dict[int, Child], options: Options, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The user of the smallest library's silos, in the smallest library and in each larger one."""
    smallest, *larger = options.adapters
    rows = []
    for count in larger:
        say(f"answers: {options.answers} with {smallest} and {options.answers} with {count} adapters resident")
        rows.append(await crowded(engines[smallest], engines[count], (smallest, count), options.answers))
    return rows


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
