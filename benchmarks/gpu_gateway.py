"""The gateway's own engine on a card: does it answer as the slow reference does, and how fast is it.

    python benchmarks/gpu_gateway.py [--model DIR]          # on a card; within --seconds
    python benchmarks/gpu_gateway.py --tiny                 # tiny, on a CPU: the control flow only

1. The conformance suite of the engines (tests/inference_gateway/conformance) with engines on the card: mixed users in
   every mode, prompts in chunks, swaps and revocations in the middle, attribution; the tokens of fp64 transformers.
2. Speed: tokens per second of concurrent streams with N adapters resident, in each mode, against the same engine's base
   and against ``generate`` on a static batch, interleaved. Without --model a random model of SmolLM2-135M's shape (or
   --shape llama-8b): speed does not depend on what the weights are. Adapters are random, N of them drawn from
   --distinct. Kernels are compiled first, by processes of their own, side by side.

Results go to stdout, the short table last, and to $OUT (or --out) as JSON. Exit status 1 if an answer was wrong.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
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
    parser.add_argument("--adapters", type=int, nargs="+", default=[3, 16, 64, 1024])
    parser.add_argument("--distinct", type=int, default=32, help="different adapters among them")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=150.0, help="no further round begins after so many")
    parser.add_argument("--routing", choices=["kernels", "torch"], default="kernels")
    parser.add_argument("--only", nargs="+", choices=["conformance", "speed"], default=["conformance", "speed"])
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the CPU; no time is judged")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
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


def build(options: argparse.Namespace) -> Bench:
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
        kernels=options.routing == "kernels" and (not options.tiny or "TRITON_INTERPRET" in os.environ),
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


async def speed(options: argparse.Namespace, ends: float) -> dict[str, Any]:
    """Rows of figures, for each N once every round; a round that would begin after ``ends`` is left out."""
    began = time.monotonic()
    bench = build(options)
    await bench.engine.start()
    print(f"model, adapters and engine: {time.monotonic() - began:.0f} s", flush=True)
    rows: list[dict[str, Any]] = []
    seconds: dict[str, float] = {"build": time.monotonic() - began}
    try:
        for count in options.adapters:
            filled = time.monotonic()
            cases = await bench.cases(count)
            seconds[f"library of {count}"] = time.monotonic() - filled
            samples: dict[str, list[Sample]] = {case.name: [] for case in cases}
            for number in range(options.rounds + 1):  # the first one warms up
                if time.monotonic() > ends:
                    break
                for case in cases if number % 2 == 0 else cases[::-1]:
                    sample = await case.run()
                    if number:
                        samples[case.name].append(sample)
                    else:
                        seconds[f"first {case.name}"] = sample.seconds
            if samples[cases[0].name]:
                rows += [figures(case, samples) for case in cases]
                print("\n".join(line(row) for row in rows[-len(cases) :]), flush=True)
            else:
                print(f"N = {count}: no time left", flush=True)
    finally:
        await bench.engine.stop()
    return {"rows": rows, "seconds": seconds}


def line(row: dict[str, Any]) -> str:
    ratio = f"  {row['ratio']:.3f} of {row['against']}" if "ratio" in row else ""
    return f"{row['case']:44} {row['tokens per second']:9.1f} tokens/s{ratio}"


def warm(options: argparse.Namespace) -> float:
    """Compile what the speed section will run, each mode and library size in a process; returns seconds."""
    began = time.monotonic()
    given = [sys.executable, __file__, "--only", "speed", "--shape", options.shape, "--rank", str(options.rank)]
    given += ["--streams", str(options.streams), "--prompt", str(options.prompt), "--tokens", "2", "--rounds", "0"]
    given += ["--distinct", "2", "--seconds", "200"]
    if options.model is not None:
        given += ["--model", str(options.model)]
    sizes = {options.adapters[0], options.adapters[-1]}
    processes = [
        subprocess.Popen([*given, "--warm", mode, "--adapters", str(count)], stdout=subprocess.DEVNULL)
        for mode in MODES
        for count in sizes
    ]
    for process in processes:
        process.wait()
    return time.monotonic() - began


def conformance(options: argparse.Namespace) -> dict[str, Any]:
    """The suite's own verdict."""
    which = ["-k", "cuda", "-n", "6"]
    if options.tiny:
        which = ["-n", "0", "-k", "limit and transformers-prefix"]
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.gateway_fixtures"),
        *(f"--confcutdir={SUITE}", SUITE, "--durations=6", "--timeout=240", *which),
    ]
    began = time.monotonic()
    env = os.environ | {"TRITON_INTERPRET": "0", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - began
    print(done.stdout[-3000:], done.stderr[-1500:], flush=True)
    return {"passed": done.returncode == 0, "seconds": seconds, "output": done.stdout[-20_000:]}


def main() -> int:
    options = arguments()
    ends = time.monotonic() + options.seconds
    if options.warm is not None:
        SHAPES[options.shape]["num_hidden_layers"] = 2
        asyncio.run(speed(options, ends))
        return 0
    options.warm = ""
    found: dict[str, Any] = {
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "options": {name: str(value) for name, value in vars(options).items()},
    }
    right = True
    if "conformance" in options.only:
        found["conformance"] = conformance(options)
        right = found["conformance"]["passed"]
    if "speed" in options.only:
        if not options.tiny and options.routing == "kernels":
            found["compiled in"] = warm(options)
            print(f"kernels compiled: {found['compiled in']:.0f} s", flush=True)
        found["speed"] = asyncio.run(speed(options, ends))
    (options.out / "gpu_gateway.json").write_text(json.dumps(found, indent=1))
    if "conformance" in found:
        print(f"conformance: {'PASS' if right else 'FAIL'} in {found['conformance']['seconds']:.0f} s")
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
