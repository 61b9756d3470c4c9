"""Nothing that the engine does mixes tensors of two devices, as far as that can be told without a GPU."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.generation.continuous_batching import continuous_api

from inference_gateway.engine.base import Finished, GenerationRequest, Sampling, Tokens
from inference_gateway.engine.transformers_engine import EngineLimits, TransformersEngine
from seqr.library import Library, PermissionRows
from seqr.models import load_base_model
from seqr.plan import Plan
from seqr.public_calibration import CalibrationText, collect_z
from seqr.routed_linear import adapt_model
from seqr.routing.evidence import EvidenceState, Standing
from seqr.shared_a import verify_a
from seqr.step import Segment
from tests.inference_gateway.pretend_gpu import OnGpu, PretendGpu, put_on_gpu
from tests.inference_gateway.support import EOS, OpenGuard, Resident, prompts, resident, serve, with_engine
from tests.seqr.kernels.conftest import reason_to_skip

MODES = ("prompt_evidence", "evidence", "per_token")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every thread of an engine pretends, and there are no streams to wait for."""

    def pretending(function: Any) -> Any:
        def pretend(*args: Any, **kwargs: Any) -> Any:
            with PretendGpu():
                return function(*args, **kwargs)

        return pretend

    manager = continuous_api.ContinuousBatchingManager
    monkeypatch.setattr(manager, "_run_generation_loop", pretending(manager._run_generation_loop))
    monkeypatch.setattr(TransformersEngine, "_change", pretending(TransformersEngine._change))
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: _Stream())
    monkeypatch.setattr("torch.cuda.default_stream", lambda device: _Stream())
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    with PretendGpu():
        yield


class _Stream:
    def wait_stream(self, other: "_Stream") -> None:
        """There is one."""


def test_pretending_finds_what_a_gpu_would_refuse(gpu: None) -> None:
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    assert isinstance(there, OnGpu) and there.device.type == "cuda"
    with pytest.raises(RuntimeError, match="same device"):
        there + here
    with pytest.raises(RuntimeError, match="same device"):
        here.index_select(0, torch.tensor([1], device="cuda"))
    assert (there + here.to("cuda")).cpu().tolist() == [2.0, 2.0, 2.0]


def test_an_engine_on_a_gpu_mixes_no_devices_and_answers_as_on_a_cpu(gpu: None, model_dir: Path, plan: Plan) -> None:
    residents = [resident(plan, silo, seed) for seed, silo in enumerate(("gamma", "alpha", "beta"))]
    later = resident(plan, "beta", 9, revision=2)
    asked = prompts(9, longest=48)

    async def answers(engine: TransformersEngine, name: str, known: list[Resident]) -> list[list[int]]:
        keys = frozenset(one.key for one in known)

        async def one(index: int) -> list[int]:
            drawn = Sampling(temperature=0.7, seed=index, logprobs=2) if index % 4 == 3 else Sampling()
            request = GenerationRequest(
                f"{name}{index}", tuple(asked[index]), 6, keys, MODES[index % 3], drawn, attribution=index % 2 == 0
            )
            tokens: list[int] = []
            async for event in engine.generate(request):
                if isinstance(event, Tokens):
                    tokens.extend(event.ids)
                else:
                    assert isinstance(event, Finished), event
            return tokens

        return list(await asyncio.gather(*(one(i) for i in range(len(asked)))))

    async def use(engine: TransformersEngine) -> list[list[int]]:
        before = await answers(engine, "a", residents)
        await engine.load(later.key, later.adapter, later.statistics)
        await engine.revoke(residents[0].key)
        return before + await answers(engine, "b", [residents[1], later])

    model, _ = load_base_model(model_dir, torch.float32, "sdpa")
    put_on_gpu(model)
    adapt_model(model, plan, verify_a(plan))
    limits = EngineLimits(24, 32, 4096, page_size=16, prefix_sharing=True, kernels=False)
    pretended = TransformersEngine(model, plan, OpenGuard(), [EOS], limits)
    assert with_engine(pretended, residents, use) == serve(model_dir, plan, use, residents)


def test_calibration_on_a_gpu_gives_z_on_the_cpu(gpu: None, model_dir: Path, plan: Plan) -> None:
    model, _ = load_base_model(model_dir, torch.float32, "sdpa")
    texts = [CalibrationText(row) for row in prompts(5, longest=20) if len(row) > 1]
    a = verify_a(plan)
    here = collect_z(model, texts, plan, a)
    there = collect_z(put_on_gpu(model), texts, plan, a)
    for name, z in here.items():
        assert not isinstance(there[name], OnGpu)
        torch.testing.assert_close(there[name], z)


@pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip() or "it can run")
def test_a_step_of_the_kernels_mixes_no_devices(gpu: None, plan: Plan) -> None:
    """As far as their launches, for which the interpreter would need a CPU's addresses."""
    from seqr.kernels.serving import device_step
    from seqr.kernels.tables import SiteTables

    library = Library.empty(plan, "cuda")
    for seed, silo in enumerate(("alpha", "beta")):
        one = resident(plan, silo, seed)
        library = library.add(silo, 1, one.adapter, one.statistics)
    tables = [
        SiteTables.of_stacks([stack], [spec.out_features], torch.float32)
        for stack, spec in zip(library.stacks, plan.modules, strict=True)
    ]
    rows = PermissionRows(library)
    row = rows.row_for(["alpha", "beta"])
    state = EvidenceState(len(plan.modules), 4, library.columns, library.width, "cuda")
    segments = [
        Segment(row, 0, 5, 1),
        Segment(row, 0, 2, mode="per_token"),
        Segment(row, 9, 1, mode="prompt_evidence", standing=Standing({("beta", 1): 3.0})),
    ]
    step = device_step(rows, segments, tables, state, 9)
    assert step.batch.settled.tolist() == [-1] * 7 + [1, -1]
    held = (step.bits, step.chosen, step.sums, step.batch.row, step.chunks.chunk if step.chunks else None)
    assert all(isinstance(t, OnGpu) for t in held)
