"""How soon after a revocation the last token of a stream arrives: python -m benchmarks.revocation_latency DIR

DIR holds a prepared base model. A policy in a database grants one silo to as many users as there are streams; while all
streams run, one user's grant is revoked, and the time is taken from the moment that the revocation has returned to the
moment that its stream's last token has been handed to whoever asked for it (0 if none came after it), and to the error
that ends it. ``--by engine`` revokes the adapter in the engine instead, which ends all streams. The bar: p99 of the
last token at most one step and 50 ms. Adapters are random.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from inference_gateway.engine.base import AdapterKey, Failed, GenerationRequest, Tokens
from inference_gateway.engine.transformers_engine import EngineLimits, TransformersEngine
from inference_gateway.permissions import Permissions
from policy.db import create_engine_for, upgrade
from policy.store import PolicyStore
from seqr.adapter import Adapter
from seqr.bench.gateway.shelf import bench_plan, random_adapter
from seqr.models import load_base_model
from seqr.plan import Plan
from seqr.routed_linear import adapt_model
from seqr.shared_a import verify_a

SILO = "clinic"
ACTOR = "bench"
REASON = "measuring"


@dataclass
class Stream:
    """One user's stream: when its last token came, and when its end."""

    user: str
    last: float = 0.0
    end: float = 0.0
    tokens: int = 0


@dataclass
class Bench:
    engine: TransformersEngine
    permissions: Permissions
    store: PolicyStore
    key: AdapterKey
    adapter: Adapter
    plan: Plan
    prompt: int
    grants: dict[str, str] = field(default_factory=dict)

    def grant(self, user: str) -> None:
        self.grants[user] = self.store.add_grant(f"user:{user}", SILO, actor=ACTOR, reason=REASON).grant_id

    async def load(self) -> None:
        await self.engine.load(self.key, self.adapter, {spec.name: (0.05, 0.02) for spec in self.plan.modules})

    async def follow(self, stream: Stream) -> None:
        ids = tuple(range(100, 100 + self.prompt))
        name = f"{stream.user}-{time.monotonic_ns()}"
        request = GenerationRequest(name, ids, 100_000, frozenset([self.key]), "per_token")
        caller, decision = self.permissions.logged_in(stream.user), self.permissions.decide(stream.user)
        with self.permissions.watching(name, caller, decision, frozenset([SILO])):
            async for event in self.engine.generate(request):
                if isinstance(event, Tokens):
                    stream.last, stream.tokens = time.perf_counter(), stream.tokens + len(event.ids)
                elif isinstance(event, Failed):
                    stream.end = time.perf_counter()

    async def round(self, streams: int, by: str) -> list[tuple[float, float]]:
        """Seconds from one revocation to the last token and to the end, for each stream that it ended."""
        running = [Stream(f"user{index}") for index in range(streams)]
        jobs = [asyncio.create_task(self.follow(stream)) for stream in running]
        while not all(stream.tokens > 3 for stream in running):
            await asyncio.sleep(0.005)
        if by == "engine":
            lost = running
            await self.engine.revoke(self.key)
        else:
            lost = running[:1]
            grant = self.grants.pop(lost[0].user)
            await asyncio.to_thread(self.store.revoke_grant, grant, actor=ACTOR, reason=REASON)
        revoked = time.perf_counter()
        while not all(stream.end for stream in lost):
            await asyncio.sleep(0.001)
        times = [(max(0.0, stream.last - revoked), max(0.0, stream.end - revoked)) for stream in lost]
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
        if by == "engine":
            await self.load()
        else:
            self.grant(lost[0].user)
        return times


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--by", default="policy", choices=("policy", "engine"))
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, _ = load_base_model(options.model, getattr(torch, options.dtype), "sdpa")
    plan = bench_plan(options.model, model, options.rank, options.dtype)
    adapt_model(model, plan, verify_a(plan))
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/policy.db"
        upgrade(url)
        database = create_engine_for(url)
        store, permissions = PolicyStore(database), Permissions(database)
        store.add_silo(SILO, actor=ACTOR, reason=REASON)
        for index in range(options.streams):
            store.create_user(f"user{index}", actor=ACTOR, reason=REASON)
        limits = EngineLimits(max_concurrent=options.streams)
        engine = TransformersEngine(model, plan, permissions, [], limits)
        await engine.start()
        adapter = random_adapter(plan, 0)
        bench = Bench(engine, permissions, store, AdapterKey(SILO, 1, adapter.digest), adapter, plan, options.prompt)
        await bench.load()
        for index in range(options.streams):
            bench.grant(f"user{index}")
        times = [one for _ in range(options.rounds) for one in await bench.round(options.streams, options.by)]
        info = engine.info()
        await engine.stop()
    figures = {"by": options.by, "streams": options.streams, "revocations": options.rounds}
    step_ms = 1000 * info.step_seconds / info.steps
    for name, column in (("last_token", [one[0] for one in times]), ("end", [one[1] for one in times])):
        for share in (0.5, 0.99):
            figures[f"{name}_p{share * 100:.0f}_ms"] = round(1000 * percentile(column, share), 1)
        figures[f"{name}_mean_ms"] = round(1000 * statistics.fmean(column), 1)
    print(json.dumps({**figures, "mean_step_ms": round(step_ms, 1)}))


if __name__ == "__main__":
    asyncio.run(main())
