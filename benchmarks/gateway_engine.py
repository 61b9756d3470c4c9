"""Tokens per second of the embedded engine, routed and base alone, interleaved: python -m benchmarks.gateway_engine DIR

DIR holds a prepared base model. Adapters are random, so the figures are about speed only.
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from inference_gateway.engine.base import AdapterKey, Failed, Finished, GenerationRequest
from inference_gateway.engine.transformers_engine import EngineLimits, TransformersEngine
from seqr.adapter import Adapter, ModuleAdapter
from seqr.factorize import factorize
from seqr.keys import SealingKey, SigningKey
from seqr.models import base_model_digest, linear_module_names, load_base_model
from seqr.plan import GatewayKey, Plan, create_plan
from seqr.routed_linear import adapt_model
from seqr.shared_a import verify_a


class NoGuard:
    """Nothing is ever withdrawn."""

    def withdrawn(self) -> Mapping[str, Failed]:
        return {}


def make_plan(path: Path, model: torch.nn.Module, targets: str, rank: int, dtype: str) -> Plan:
    return create_plan(
        federation="bench",
        base_model=path.name,
        base_model_digest=base_model_digest(path),
        modules=linear_module_names(model, targets),
        rank=rank,
        alpha=2.0 * rank,
        seed=1,
        dtype=dtype,
        gateway_keys=[GatewayKey.of(SealingKey.generate().public, SigningKey.generate().public)],
    )


def random_adapter(plan: Plan, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for spec in plan.modules:
        q, r = factorize(torch.randn(spec.out_features, plan.rank, generator=generator) * 1e-3, plan.scale)
        modules[spec.name] = ModuleAdapter(q, r, 1.0, 1.0)
    return Adapter(modules)


async def measure(
    engine: TransformersEngine, streams: int, prompt: int, tokens: int, keys: frozenset[AdapterKey], mode: str
) -> tuple[float, float]:
    """(generated tokens per second, per second of processor time) over all streams, prefill included."""

    async def one(index: int) -> int:
        ids = tuple((7 * index + 13 * position) % 20_000 + 100 for position in range(prompt))
        request = GenerationRequest(f"{time.monotonic_ns()}-{index}", ids, tokens, keys, mode)
        count = 0
        async for event in engine.generate(request):
            if isinstance(event, Finished):
                return count
            if isinstance(event, Failed):
                raise RuntimeError(event.message)
            count += len(event.ids)
        return count

    wall, cpu = time.perf_counter(), time.process_time()
    made = sum(await asyncio.gather(*(one(index) for index in range(streams))))
    return made / (time.perf_counter() - wall), made / (time.process_time() - cpu)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--targets", default="all", choices=("all", "attention"))
    parser.add_argument("--adapters", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, _ = load_base_model(options.model, getattr(torch, options.dtype), "sdpa")
    plan = make_plan(options.model, model, options.targets, options.rank, options.dtype)
    adapt_model(model, plan, verify_a(plan))
    engine = TransformersEngine(model, plan, NoGuard(), [], EngineLimits(max_concurrent=options.streams))
    await engine.start()
    keys: list[AdapterKey] = []
    for index in range(options.adapters):
        adapter = random_adapter(plan, index)
        keys.append(AdapterKey(f"silo{index:04d}", 1, adapter.digest))
        moments = {spec.name: (0.05, 0.02) for spec in plan.modules}
        await engine.load(keys[-1], adapter, moments)
    cases = {"base": (frozenset[AdapterKey](), "per_token")} | {
        mode: (frozenset(keys), mode) for mode in ("per_token", "evidence")
    }
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for round_ in range(options.rounds + 1):
        for name, (allowed, mode) in cases.items():
            rate = await measure(engine, options.streams, options.prompt, options.tokens, allowed, mode)
            if round_:  # the first round warms up
                rates[name].append(rate)
    await engine.stop()
    for name, measured in rates.items():
        wall, cpu = (statistics.median(column) for column in zip(*measured, strict=True))
        base_wall, base_cpu = (statistics.median(column) for column in zip(*rates["base"], strict=True))
        figures = {"tokens_per_s": round(wall, 1), "of_base": round(wall / base_wall, 2)}
        figures |= {"tokens_per_cpu_s": round(cpu, 1), "of_base_cpu": round(cpu / base_cpu, 2)}
        print(json.dumps({"case": name, **figures}))


if __name__ == "__main__":
    asyncio.run(main())
