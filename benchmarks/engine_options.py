"""What the engine's options cost and save, interleaved: python -m benchmarks.engine_options DIR

DIR holds a prepared base model. Processor time, so that a busy machine distorts little: tokens per second of it with
attribution and in deterministic mode, as shares of the plain engine's; and the seconds of it that a second turn takes
to its first token with and without prefix sharing, for a user of one silo and, where the prompt has to be read first,
of all. Adapters are random.
"""

import argparse
import asyncio
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from inference_gateway.engine.base import AdapterKey, Failed, GenerationRequest, Tokens
from inference_gateway.engine.transformers_engine import EngineLimits, TransformersEngine
from seqr.bench.gateway.engines import NoGuard
from seqr.bench.gateway.shelf import bench_plan, random_adapter
from seqr.models import load_base_model
from seqr.routed_linear import adapt_model
from seqr.shared_a import verify_a


async def ask(engine: TransformersEngine, **request: Any) -> int:
    """How many tokens the answer has."""
    made = 0
    async for event in engine.generate(GenerationRequest(f"r{time.monotonic_ns()}", **request)):
        if isinstance(event, Failed):
            raise RuntimeError(event.message)
        made += len(event.ids) if isinstance(event, Tokens) else 0
    return made


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--adapters", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=48)
    parser.add_argument("--turn", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    engines: dict[str, TransformersEngine] = {}
    keys: frozenset[AdapterKey] = frozenset()
    for name, chosen in (
        ("plain", {}),
        ("deterministic", {"deterministic": True}),
        ("sharing", {"prefix_sharing": True}),
    ):
        model, _ = load_base_model(options.model, getattr(torch, options.dtype), "sdpa")
        plan = bench_plan(options.model, model, 16, options.dtype)
        adapt_model(model, plan, verify_a(plan))
        limits = EngineLimits(max_concurrent=options.streams, **chosen)
        engines[name] = TransformersEngine(model, plan, NoGuard(), [], limits)
        await engines[name].start()
        for index in range(options.adapters):
            adapter = random_adapter(plan, index)
            key = AdapterKey(f"silo{index:04d}", 1, adapter.digest)
            await engines[name].load(key, adapter, {spec.name: (0.05, 0.02) for spec in plan.modules})
            keys |= {key}

    async def rate(engine: TransformersEngine, mode: str, attribution: bool) -> float:
        prompts = (
            tuple((7 * i + 13 * p) % 20_000 + 100 for p in range(options.prompt)) for i in range(options.streams)
        )
        start = time.process_time()
        made = await asyncio.gather(
            *(
                ask(engine, prompt=p, max_tokens=options.tokens, adapters=keys, mode=mode, attribution=attribution)
                for p in prompts
            )
        )
        return sum(made) / (time.process_time() - start)

    async def second_turn(engine: TransformersEngine, round_: int, silos: int) -> float:
        first = tuple((17 * round_ + 13 * p) % 20_000 + 100 for p in range(options.turn))
        some = frozenset(sorted(keys)[:silos])
        await ask(engine, prompt=first, max_tokens=1, adapters=some, mode="prompt_evidence")
        start = time.process_time()
        await ask(engine, prompt=(*first, *range(100, 120)), max_tokens=1, adapters=some, mode="prompt_evidence")
        return time.process_time() - start

    shares: dict[str, list[float]] = {}

    def note(name: str, share: float) -> None:
        shares.setdefault(name, []).append(share)
        print(json.dumps({"case": name, "round": len(shares[name]), "share_of_plain": round(share, 3)}), flush=True)

    for round_ in range(options.rounds + 1):  # the first one warms up
        for mode in ("prompt_evidence", "per_token"):
            plain = await rate(engines["plain"], mode, False)
            told = await rate(engines["plain"], mode, True)
            fixed = await rate(engines["deterministic"], mode, False)
            if round_:
                note(f"{mode}, tokens per second with attribution", told / plain)
                note(f"{mode}, tokens per second in deterministic mode", fixed / plain)
        for silos in (1, options.adapters):
            without, with_ = [await second_turn(engines[name], round_, silos) for name in ("plain", "sharing")]
            if round_:
                note(f"second turn of a user of {silos} silo(s), time with prefix sharing", with_ / without)
    for name, values in shares.items():
        print(json.dumps({"case": name, "median_share_of_plain": round(statistics.median(values), 3)}))
    for engine in engines.values():
        await engine.stop()


if __name__ == "__main__":
    asyncio.run(main())
