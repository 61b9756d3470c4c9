"""The gateway's own engine on a card: does it answer as the slow reference does, and how fast is it.

    python benchmarks/gpu_gateway.py [--model DIR]          # on a card; within --seconds
    python benchmarks/gpu_gateway.py --tiny                 # tiny, on a CPU: the control flow only

1. The conformance suite of the engines (tests/inference_gateway/conformance) with engines on the card: mixed users in
   every mode, prompts in chunks, swaps and revocations in the middle, attribution; the tokens of fp64 transformers.
2. Speed: tokens per second of concurrent streams with N adapters resident, in each mode, against the same engine's base
   and against ``generate`` on a static batch, interleaved; then for the first N without the kernels. Without --model a
   random model of SmolLM2-135M's shape (or --shape llama-8b): speed does not depend on what the weights are. Adapters
   are random, N of them drawn from --distinct. Kernels are compiled before, beside 1, by processes of their own.

Results go to stdout, the short table last, and to $OUT (or --out) as JSON. Exit status 1 if an answer was wrong.
"""

import argparse
import asyncio
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from inference_gateway.engine.transformers_engine import EngineLimits
from seqr.bench.gateway.engines import FilledEngine, Load, MeasuredEngine, NoGuard
from seqr.bench.gateway.peers import Static
from seqr.bench.gateway.sample import Case, Sample, figures
from seqr.bench.gateway.shelf import prompts, random_columns, silo_name
from seqr.errors import SeqrError
from seqr.keys import SealingKey, SigningKey
from seqr.library import Column, Library
from seqr.models import linear_module_names, load_base_model
from seqr.plan import GatewayKey, Plan, create_plan
from seqr.public_calibration import CalibrationText, collect_z
from seqr.routed_linear import adapt_model
from seqr.shared_a import verify_a

ROOT = Path(__file__).resolve().parent.parent
MODES = ("prompt_evidence", "evidence", "per_token")
STATIC = "generate, static batch"
SUITE = "tests/inference_gateway/conformance"
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "vocab_size": 259, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True,
    },
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a prepared base model; none: a random one of --shape")
    parser.add_argument("--shape", choices=list(SHAPES), default="smollm2-135m")
    parser.add_argument("--adapters", type=int, nargs="+", default=[16, 1024, 3, 64])
    parser.add_argument("--distinct", type=int, default=32, help="different adapters among them")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=140.0, help="the speed section begins no round after so many")
    parser.add_argument("--routing", nargs="+", choices=["kernels", "torch"], default=["kernels", "torch"])
    parser.add_argument("--only", nargs="+", choices=["conformance", "speed"], default=["conformance", "speed"])
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the CPU; no time is judged")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--compiled", action="store_true", help="the kernels were compiled by an earlier run")
    parser.add_argument("--warm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        small = {"shape": "tiny", "adapters": [3, 65], "distinct": 3, "streams": 2, "prompt": 8, "tokens": 3}
        vars(options).update(small | {"rounds": 1, "rank": 4})
    return options


@dataclass
class Bench:
    """A model on a device with an engine over it, and what its streams ask for."""

    options: argparse.Namespace
    engine: FilledEngine
    static: Static
    plan: Plan
    load: Load
    drawn: list[Column]

    async def cases(self, count: int) -> list[Case]:
        """With ``count`` adapters resident from here on: the base, every mode and the static batch."""
        columns = [replace(self.drawn[i % len(self.drawn)], silo_id=silo_name(i)) for i in range(count)]
        library = Library(self.plan, columns, version=count, device=self.drawn[0].modules[0].b_t.device)
        await self.engine.fill(library)
        measured, base = MeasuredEngine(self.engine, self.load, library, 0), f"base alone, N = {count}"
        routed = [
            Case(f"{mode}, N = {count}", count, partial(measured.run, count, mode), base)
            for mode in self.options.warm.split() or MODES
        ]
        static = Case(f"{STATIC} (N = {count})", 0, self.static.run)
        return [Case(base, count, partial(measured.run, 0, "per_token"), static.name), *routed, static]


def build(options: argparse.Namespace, kernels: bool) -> Bench:
    device = "cpu" if options.tiny else "cuda"
    model, other = (base_model(options, device) for _ in range(2))
    vocabulary = int(model.config.get_text_config().vocab_size)
    plan = create_plan(
        federation="bench",
        base_model="bench",
        base_model_digest="sha256:" + "0" * 64,
        modules=linear_module_names(model, "attention"),
        rank=options.rank,
        alpha=2.0 * options.rank,
        seed=1,
        dtype="bfloat16",
        gateway_keys=[GatewayKey.of(SealingKey.generate().public, SigningKey.generate().public)],
    )
    a = verify_a(plan)
    texts = [CalibrationText(row) for row in prompts(16, 32, vocabulary)]
    z = collect_z(model, texts, plan, a)
    adapt_model(model, plan, a)
    asked = tuple(prompts(options.streams, options.prompt, vocabulary))
    load = Load(asked, options.tokens, "bfloat16", 2 * options.streams * (options.prompt + options.tokens))
    limits = EngineLimits(
        max_concurrent=options.streams,
        kv_tokens=load.kv_tokens,
        kernels=kernels and (not options.tiny or "TRITON_INTERPRET" in os.environ),
    )
    engine = FilledEngine(model, plan, NoGuard(), [], limits)
    drawn = random_columns(plan, min(options.distinct, max(options.adapters)), z, model.device)
    return Bench(options, engine, Static(other, load), plan, load, drawn)


def base_model(options: argparse.Namespace, device: str) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    if options.model is not None:
        return load_base_model(options.model, torch.bfloat16, "sdpa")[0].to(device)
    config = LlamaConfig(**SHAPES[options.shape])
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.eval()


async def speed(options: argparse.Namespace, routing: str, sizes: Sequence[int], ends: float) -> dict[str, Any]:
    """Rows of figures for each N of ``sizes``; a round that would begin after ``ends`` is left out."""
    began = time.monotonic()
    bench = build(options, routing == "kernels")
    await bench.engine.start()
    seconds: dict[str, float] = {"build": time.monotonic() - began}
    found: dict[str, Any] = {"routing": routing, "rows": [], "seconds": seconds, "errors": []}
    print(f"routing by {routing}: model, adapters and engine in {seconds['build']:.0f} s", flush=True)
    try:
        for count in sizes:
            filled = time.monotonic()
            cases = await bench.cases(count)
            seconds[f"library of {count}"] = time.monotonic() - filled
            rows = await measured(cases, options.rounds, ends, seconds)
            print("\n".join(line(row) for row in rows) or f"N = {count}: no time left", flush=True)
            found["rows"] += rows
    except SeqrError as error:
        found["errors"].append(f"{error.code}: {error}")
        print(f"FAILED, routing by {routing}: {error}", flush=True)
    finally:
        await bench.engine.stop()
    return found


async def measured(cases: Sequence[Case], rounds: int, ends: float, seconds: dict[str, float]) -> list[dict[str, Any]]:
    """Every case once a round, after one that warms up; every second round in reverse. Only whole rounds count."""
    samples: dict[str, list[Sample]] = {case.name: [] for case in cases}
    for number in range(rounds + 1):
        if time.monotonic() > ends:
            break
        for case in cases if number % 2 == 0 else cases[::-1]:
            sample = await case.run()
            if number:
                samples[case.name].append(sample)
            else:
                seconds[f"first {case.name}"] = sample.seconds
    return [figures(case, samples) for case in cases] if samples[cases[0].name] else []


def line(row: dict[str, Any]) -> str:
    ratio = f"  {row['ratio']:.3f} of {row['against']}" if "ratio" in row else ""
    return f"{row['case']:44} {row['tokens per second']:9.1f} tokens/s{ratio}"


def warming(options: argparse.Namespace) -> list[subprocess.Popen[bytes]]:
    """Processes that compile what the speed section will run: a mode and a library size each."""
    given = [sys.executable, __file__, "--only", "speed", "--shape", options.shape, "--rank", str(options.rank)]
    given += ["--streams", str(options.streams), "--prompt", str(options.prompt), "--tokens", "2", "--rounds", "0"]
    given += ["--distinct", "2", "--seconds", "200"]
    if options.model is not None:
        given += ["--model", str(options.model)]
    return [
        subprocess.Popen([*given, "--warm", mode, "--adapters", str(count)], stdout=subprocess.DEVNULL)
        for mode in MODES
        for count in sorted({min(options.adapters), max(options.adapters)})
    ]


def conformance(options: argparse.Namespace) -> dict[str, Any]:
    """The suite's own verdict."""
    which = ["-k", "cuda", "-n", "8"]
    if options.tiny:
        which = ["-n", "0", "-k", "limit and transformers-prefix"]
    command = [
        *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.gateway_fixtures"),
        *("-p", "xdist.plugin", "-p", "pytest_timeout"),
        *(f"--confcutdir={SUITE}", SUITE, "--durations=8", "--tb=short", "--timeout=280", *which),
    ]
    env = os.environ | {
        "TRITON_INTERPRET": "0",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    began = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=300)
        passed, output = done.returncode == 0, done.stdout + done.stderr[-3000:]
    except subprocess.TimeoutExpired as error:
        passed, output = False, f"{error}\n{error.stdout!r}"
    print(output[-5000:], flush=True)
    return {"passed": passed, "seconds": time.monotonic() - began, "output": output[-50_000:]}


def main() -> int:
    logging.basicConfig(level=logging.WARNING)
    options = arguments()
    if options.warm is not None:
        SHAPES[options.shape]["num_hidden_layers"] = 2
        asyncio.run(speed(options, "kernels", options.adapters, time.monotonic() + options.seconds))
        return 0
    options.warm = ""
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "options": {name: str(value) for name, value in vars(options).items()},
        "speed": [],
    }
    began = time.monotonic()
    compiling = warming(options) if "speed" in options.only and not (options.tiny or options.compiled) else []
    if "conformance" in options.only:
        found["conformance"] = conformance(options)
    for process in compiling:
        try:
            process.wait(timeout=max(1.0, began + 300.0 - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
    found["compiled after"] = time.monotonic() - began
    print(f"conformance and compiling: {found['compiled after']:.0f} s", flush=True)
    ends = time.monotonic() + options.seconds
    if "speed" in options.only:
        for routing in options.routing:
            sizes = options.adapters if routing == options.routing[0] else options.adapters[:1]
            found["speed"].append(asyncio.run(speed(options, routing, sizes, ends)))
            (options.out / "gpu_gateway.json").write_text(json.dumps(found, indent=1))
    (options.out / "gpu_gateway.json").write_text(json.dumps(found, indent=1))
    wrong = [error for one in found["speed"] for error in one["errors"]]
    if "conformance" in found:
        told = found["conformance"]
        print(f"conformance: {'PASS' if told['passed'] else 'FAIL'} in {told['seconds']:.0f} s")
        wrong += [] if told["passed"] else ["conformance"]
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
