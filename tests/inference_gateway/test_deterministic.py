"""Deterministic serving: an answer's logits are the same bits whatever else is in the batch."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from inference_gateway.engine.base import Sampling
from inference_gateway.engine.invariant import make_invariant, one_sequence
from inference_gateway.engine.linears import TiledLinear
from inference_gateway.engine.transformers_engine import TransformersEngine
from inference_gateway.errors import EngineIncompatible
from seqr.plan import Plan
from tests.inference_gateway.support import Reference, Resident, ask, prompts, resident, serve

MODES = ("prompt_evidence", "evidence", "per_token")
TEXT = prompts(1, seed=8)[0] + prompts(1, seed=9)[0]


@pytest.fixture
def residents(plan: Plan) -> list[Resident]:
    return [resident(plan, silo, seed) for seed, silo in enumerate(("alpha", "beta", "gamma"))]


def logits_of_mine(
    model_dir: Path,
    plan: Plan,
    residents: list[Resident],
    mode: str,
    crowd: int,
    dtype: torch.dtype = torch.float32,
    **limits: Any,
) -> tuple[list[int], list[torch.Tensor]]:
    """One request among others that come before, with and after it, and all its logits."""

    async def use(engine: TransformersEngine) -> Any:
        seen: list[torch.Tensor] = []
        pick = engine.steps.pick

        def spy(request_ids: Any, logits: torch.Tensor) -> None:
            seen.extend(logits[row].clone() for row, name in enumerate(request_ids) if name == "mine")
            pick(request_ids, logits)

        engine.steps.pick = spy  # type: ignore[method-assign]
        keys = [one.key for one in residents]
        others = [
            ask(engine, f"o{i}", text, keys[i % 3 :], MODES[i % 3], 5 + i, sampling=Sampling(temperature=i % 2))
            for i, text in enumerate(prompts(crowd, seed=crowd))
        ]
        before = [asyncio.create_task(other) for other in others[: crowd // 2]]
        await asyncio.sleep(0.05 if crowd else 0)
        mine = asyncio.create_task(ask(engine, "mine", TEXT, keys[:2], mode, 16))
        await asyncio.gather(*before, *others[crowd // 2 :])
        return (await mine).tokens, seen

    chosen = {"max_batch_tokens": 40, "max_concurrent": 16} | limits
    tokens, seen = serve(model_dir, plan, use, residents, dtype=dtype, **chosen)
    assert len(tokens) == len(seen)
    return tokens, seen


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_no_bit_of_an_answer_depends_on_what_else_is_in_the_batch(
    model_dir: Path, plan: Plan, residents: list[Resident], mode: str, dtype: torch.dtype
) -> None:
    tokens, alone = logits_of_mine(model_dir, plan, residents, mode, 0, dtype, deterministic=True)
    for crowd, budget in ((5, 40), (11, 23)):
        again, bits = logits_of_mine(
            model_dir, plan, residents, mode, crowd, dtype, deterministic=True, max_batch_tokens=budget
        )
        assert again == tokens and equal(alone, bits)


def test_otherwise_bits_do_depend_on_the_batch(model_dir: Path, plan: Plan, residents: list[Resident]) -> None:
    """What the mode is for, and that these tests can see it."""
    _, alone = logits_of_mine(model_dir, plan, residents, "per_token", 0)
    _, bits = logits_of_mine(model_dir, plan, residents, "per_token", 5)
    assert not equal(alone, bits)


def test_a_shared_prefix_leaves_no_trace_in_a_deterministic_answer(
    model_dir: Path, plan: Plan, residents: list[Resident]
) -> None:
    async def use(engine: TransformersEngine) -> Any:
        seen: dict[str, list[torch.Tensor]] = {"one": [], "two": []}
        pick = engine.steps.pick

        def spy(request_ids: Any, logits: torch.Tensor) -> None:
            for row, name in enumerate(request_ids):
                seen[name].append(logits[row].clone())
            pick(request_ids, logits)

        engine.steps.pick = spy  # type: ignore[method-assign]
        for name in seen:
            await ask(engine, name, TEXT, [residents[0].key], "per_token", 8)
        return seen, engine.info().prefix_hits

    seen, hits = serve(model_dir, plan, use, residents, deterministic=True, prefix_sharing=True)
    assert hits > 0 and equal(seen["one"], seen["two"])


@pytest.mark.parametrize("mode", MODES)
def test_it_answers_as_the_reference_does(model_dir: Path, plan: Plan, residents: list[Resident], mode: str) -> None:
    tokens, _ = logits_of_mine(model_dir, plan, residents, mode, 3, deterministic=True)
    assert tokens == Reference(model_dir, plan, residents).answer(TEXT, ["alpha", "beta"], mode, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(576, 1536), (1536, 576), (64, 259), (24, 40)])
def test_a_tiled_row_has_the_same_bits_wherever_it_stands(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(*shape, dtype=dtype)
    tiled, x = TiledLinear(linear), torch.randn(77, shape[0]).to(dtype)
    with torch.no_grad():
        whole, order = tiled(x), torch.randperm(77)
        assert torch.equal(tiled(x[order]), whole[order])
        assert all(torch.equal(tiled(x[start : start + size]), whole[start : start + size])
                   for start, size in ((0, 1), (5, 16), (60, 17)))  # fmt: skip
        assert torch.allclose(whole, linear(x), rtol=2e-2, atol=1e-2 if dtype == torch.bfloat16 else 1e-5)
    assert tiled.weight is linear.weight


def test_attention_is_the_usual_one_and_does_not_depend_on_how_a_prompt_is_cut() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 150, 16) for _ in range(3))
    whole = one_sequence(q * 0.25, k, v)
    assert torch.allclose(whole, F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25), atol=1e-5)
    for cuts in ((7, 64, 65, 150), (1, 2, 3, 100, 149, 150), (150,)):
        parts, start = [], 0
        for end in cuts:
            parts.append(one_sequence(q[:, start:end] * 0.25, k[:, :end], v[:, :end]))
            start = end
        assert torch.equal(torch.cat(parts, dim=1), whole)


def test_a_model_that_is_not_on_a_cpu_is_refused_by_name() -> None:
    with pytest.raises(EngineIncompatible, match="for CPUs only; the model is on meta"):
        make_invariant(torch.nn.Linear(4, 4, device="meta"))
