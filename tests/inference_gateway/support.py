"""A tiny routed model, adapters drawn at random, and the slow reference that every engine is compared with."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from inference_gateway.engine.base import (
    AdapterKey,
    Failed,
    Finished,
    GenerationRequest,
    Sampling,
    Tokens,
)
from inference_gateway.engine.transformers_engine import EngineLimits, TransformersEngine
from seqr.adapter import Adapter, ModuleAdapter
from seqr.factorize import factorize
from seqr.keys import SealingKey, SigningKey
from seqr.models import base_model_digest, linear_module_names, load_base_model
from seqr.plan import GatewayKey, Plan, create_plan
from seqr.routed_linear import adapt_model
from seqr.shared_a import verify_a

EOS = 2
RANK = 4
Statistics = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Gateway:
    """The private keys of a gateway under test."""

    sealing: SealingKey
    signing: SigningKey

    @property
    def public(self) -> GatewayKey:
        return GatewayKey.of(self.sealing.public, self.signing.public)


def make_plan(model_dir: Path, gateway: Gateway, kind: str = "all", routing: str = "prompt_evidence") -> Plan:
    model, _ = load_base_model(model_dir, torch.float32)
    return create_plan(
        federation="test",
        base_model="tiny",
        base_model_digest=base_model_digest(model_dir),
        modules=linear_module_names(model, kind),
        rank=RANK,
        alpha=2.0 * RANK,
        seed=7,
        gateway_keys=[gateway.public],
        routing=routing,
    )


def random_adapter(plan: Plan, seed: int, strength: float = 0.35) -> Adapter:
    """An adapter strong enough that it changes the tiny model's answers."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for spec in plan.modules:
        b = torch.randn(spec.out_features, plan.rank, generator=generator) * strength
        q, r = factorize(b, 1.0)
        modules[spec.name] = ModuleAdapter(q, r, 1.0, 1.0)
    return Adapter(modules)


def random_statistics(plan: Plan, seed: int) -> dict[str, tuple[float, float]]:
    generator = torch.Generator().manual_seed(seed + 1000)
    draw = torch.rand(len(plan.modules), 2, generator=generator).tolist()
    return {spec.name: (1.0 + 0.4 * a, 0.8 + 0.3 * b) for spec, (a, b) in zip(plan.modules, draw, strict=True)}


@dataclass(frozen=True)
class Resident:
    """One silo's adapter as a test knows it."""

    key: AdapterKey
    adapter: Adapter
    statistics: Statistics


def resident(plan: Plan, silo_id: str, seed: int, revision: int = 1, strength: float = 0.35) -> Resident:
    adapter = random_adapter(plan, seed, strength)
    return Resident(AdapterKey(silo_id, revision, adapter.digest), adapter, random_statistics(plan, seed))


class OpenGuard:
    """Withdraws nothing until told to."""

    def __init__(self) -> None:
        self.lost: dict[str, Failed] = {}
        self.asked = 0

    def withdrawn(self) -> Mapping[str, Failed]:
        self.asked += 1
        return self.lost


def build_engine(
    model_dir: Path,
    plan: Plan,
    guard: Any = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **limits: Any,
) -> TransformersEngine:
    model, _ = load_base_model(model_dir, dtype, "sdpa")
    adapt_model(model.to(device), plan, verify_a(plan))
    chosen = {"max_concurrent": 24, "max_batch_tokens": 32, "kv_tokens": 4096, "page_size": 16} | limits
    return TransformersEngine(model, plan, guard or OpenGuard(), [EOS], EngineLimits(**chosen))


@dataclass
class Answer:
    tokens: list[int]
    end: Finished | Failed | None


async def ask(
    engine: TransformersEngine,
    request_id: str,
    prompt: Sequence[int],
    adapters: Iterable[AdapterKey],
    mode: str = "prompt_evidence",
    max_tokens: int = 12,
    attribution: bool = False,
    sampling: Sampling | None = None,
) -> Answer:
    request = GenerationRequest(
        request_id, tuple(prompt), max_tokens, frozenset(adapters), mode, sampling or Sampling(), attribution
    )
    answer = Answer([], None)
    async for event in engine.generate(request):
        if isinstance(event, Tokens):
            answer.tokens.extend(event.ids)
        else:
            answer.end = event
    return answer


def cached_numbers(engine: TransformersEngine) -> int:
    """How many numbers other than zero lie in the KV cache; nothing but a look into memory tells."""
    return int(engine._edge._manager.batch_processor.cache.cache_tensor.count_nonzero())


def prompts(count: int, seed: int = 0, longest: int = 90) -> list[list[int]]:
    """Random prompts of mixed length, some longer than a step's token budget."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(3, 259, (length,), generator=generator).tolist() for length in lengths]


def run(coroutine: Any) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 300))  # on a GPU, kernels are compiled meanwhile


Use = Callable[[TransformersEngine], Awaitable[Any]]


def serve(model_dir: Path, plan: Plan, use: Use, residents: list[Resident], **options: Any) -> Any:
    return with_engine(build_engine(model_dir, plan, **options), residents, use)


def with_engine(engine: Any, residents: Sequence[Resident], use: Callable[[Any], Awaitable[Any]]) -> Any:
    """What ``use`` gives with the engine started and the adapters loaded."""

    async def session() -> Any:
        await engine.start()
        try:
            for one in residents:
                await engine.load(one.key, one.adapter, one.statistics)
            return await use(engine)
        finally:
            await engine.stop()

    return run(session())


class Reference:
    """Routing (docs/routers.md) with transformers alone: the whole sequence again for every token, in fp64, slowly."""

    def __init__(self, model_dir: Path, plan: Plan, residents: Sequence[Resident]):
        self._model, _ = load_base_model(model_dir, torch.float64, "eager")
        self._plan = plan
        self._a = {name: a.double() for name, a in verify_a(plan).items()}
        self._residents = sorted(residents, key=lambda one: one.key.silo_id.encode())
        self._b = [
            {name: part.q.double() @ part.r.double() for name, part in one.adapter.modules.items()}
            for one in self._residents
        ]
        self._permitted: list[int] = []
        self._mode = "prompt_evidence"
        self._standing: torch.Tensor | None = None
        self.margin = math.inf
        self._sum: torch.Tensor | None = None
        # For each token of the last answer: in how many modules which silo shaped the pass that it came from.
        self.won: list[dict[str, int]] = []
        for spec in plan.modules:
            self._model.get_submodule(spec.name).register_forward_hook(self._hook(spec.name))

    def answer(self, prompt: Sequence[int], silos: Iterable[str], mode: str, max_tokens: int = 12) -> list[int]:
        allowed = set(silos)
        self._permitted = [i for i, one in enumerate(self._residents) if one.key.silo_id in allowed]
        self._mode, self.margin = mode, math.inf
        tokens = list(prompt)
        self._standing = None
        self.won = []
        if mode == "prompt_evidence":
            self._permitted, readable = [], self._permitted
            self._forward(tokens)
            self._permitted = readable
            assert self._sum is not None
            self._standing = self._sum[-1:]
        while len(tokens) < len(prompt) + max_tokens:
            self.won.append({})
            tokens.append(int(self._forward(tokens).argmax()))
            if tokens[-1] == EOS:
                break
        return tokens[len(prompt) :]

    def _forward(self, tokens: Sequence[int]) -> torch.Tensor:
        self._sum = None
        with torch.no_grad():
            logits: torch.Tensor = self._model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
        return logits

    def _hook(self, name: str) -> Any:
        a = self._a[name]

        def hook(_module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            z = inputs[0][0] @ a.T
            scores = torch.stack([self._score(one, name, z) for one in self._residents], dim=1)
            value = self._value(scores)
            self._note_margin(value)
            out = output.clone()
            deltas = {i: z @ self._b[i][name].T for i in self._permitted}
            for token, row in enumerate(value.tolist()):
                if token == 0 and self._mode == "evidence":
                    continue
                best: int | None = None
                for column in self._permitted:
                    if best is None or row[column] > row[best]:
                        best = column
                if best is not None:
                    out[0, token] += deltas[best][token]
                    if token == len(value) - 1 and self.won:
                        silo = self._residents[best].key.silo_id
                        self.won[-1][silo] = self.won[-1].get(silo, 0) + 1
            return out

        return hook

    def _value(self, scores: torch.Tensor) -> torch.Tensor:
        if self._mode == "per_token":
            return scores
        if self._standing is not None:
            return self._standing.expand_as(scores)
        return self._read(scores) if self._mode == "prompt_evidence" else self._evidence(scores)

    def _read(self, scores: torch.Tensor) -> torch.Tensor:
        """The prompt's mean score in every row, a word counting half as much as the one 6 places after it."""
        last = scores.shape[0] - 1
        weights = torch.exp2((torch.arange(last + 1) - last) / 6.0)[1:, None]
        whole = ((scores.clamp(-6, 6)[1:] * weights).sum(0) / weights.sum().clamp_min(1.0)).expand_as(scores)
        self._sum = whole if self._sum is None else self._sum + whole
        return self._sum

    def _note_margin(self, value: torch.Tensor) -> None:
        """How near the nearest choice so far was to another one; exact ties, as at position 0, are not near."""
        if len(self._permitted) > 1:
            best = value[:, self._permitted].topk(2, dim=1).values
            gaps = (best[:, 0] - best[:, 1]).tolist()
            self.margin = min([self.margin, *(gap for gap in gaps if gap > 0)])

    def _score(self, one: Resident, name: str, z: torch.Tensor) -> torch.Tensor:
        mu, sigma = one.statistics[name]
        return ((z @ one.adapter.modules[name].r.double().T).norm(dim=1) - mu) / sigma

    def _evidence(self, scores: torch.Tensor) -> torch.Tensor:
        clipped = scores.clamp(-6, 6)
        clipped[0] = 0
        positions = torch.arange(scores.shape[0]).clamp_min(1)[:, None]
        mean = clipped.cumsum(0) / positions
        self._sum = mean if self._sum is None else self._sum + mean
        return self._sum
