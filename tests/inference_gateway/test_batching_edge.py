"""The private edge of transformers: if any of it moves, one of these fails and says what."""

import asyncio
import inspect
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.generation.continuous_batching import cache, continuous_api, input_outputs, requests, scheduler
from transformers.generation.continuous_batching.cache_allocators import FullAttentionCacheAllocator
from transformers.generation.continuous_batching.cache_allocators.cache_allocator import BlockLedger

from inference_gateway.engine import batching_edge
from inference_gateway.engine.base import Failed, Finished
from inference_gateway.engine.transformers_engine import TransformersEngine
from inference_gateway.errors import EngineIncompatible, EngineStopped
from seqr.logs import adopt
from seqr.models import load_base_model
from seqr.plan import Plan
from seqr.routed_linear import adapt_model
from seqr.shared_a import verify_a
from tests.inference_gateway.support import OpenGuard, ask, build_engine, prompts, resident, run

# Everything private that ``batching_edge`` relies on, as (owner, name, parameters that must exist).
PRIVATE_EDGE: tuple[tuple[Any, str, tuple[str, ...]], ...] = (
    (continuous_api.ContinuousBatchingManager, "switch_to_cb_friendly_attn", ("model", "auto_switch_to_flash")),
    (continuous_api.ContinuousBatchingManager, "_generation_step", ()),
    (continuous_api.ContinuousBatchingManager, "_generation_loop_body", ("batch_processor", "bootstrapping")),
    (continuous_api.ContinuousBatchingManager, "_create_batch_processor", ()),
    (continuous_api.ContinuousBatchingManager, "cancel_request", ("request_id",)),
    (continuous_api.ContinuousBatchingManager, "pause", ()),
    (continuous_api.OutputRouter, "deliver", ("output",)),
    (continuous_api.OutputRouter, "deliver_batch", ("outputs",)),
    (continuous_api.OutputRouter, "fail_and_deliver", ("state", "error")),
    (continuous_api.ContinuousBatchProcessor, "handle_batch_error", ("error",)),
    (continuous_api.ContinuousBatchProcessor, "fail_all_requests", ("error",)),
    (input_outputs.ContinuousBatchingIOs, "prepare_batch_tensors", ("requests_in_batch",)),
    (cache, "group_layers_by_attn_type", ("config",)),
    (cache.PagedAttentionCache, "update", ("key_states", "value_states", "layer_idx", "kwargs")),
    (cache.PagedAttentionCache, "search_prefix_match", ("request_id", "prompt_ids")),
    (cache.PagedAttentionCache, "mark_complete_blocks", ("state", "complete_blocks")),
    (requests.RequestState, "to_generation_output", ()),
    (scheduler.Scheduler, "finish_request", ("request_id",)),
    (scheduler.Scheduler, "set_request_cancellation", ("request_id",)),
    (FullAttentionCacheAllocator, "get_read_indices", ("request_id", "past_length", "query_length")),
    (FullAttentionCacheAllocator, "update", ("read_index", "write_index")),
    (FullAttentionCacheAllocator, "acquire_prefix_blocks", ("request_id", "prefix_len", "block_ids")),
    (BlockLedger, "register_new_hash", ("block_id", "block_hash")),
    (BlockLedger, "evict_cached_blocks", ()),
)


def missing_edge() -> list[str]:
    """The names of private parts that are no longer where ``batching_edge`` expects them; empty when all is well."""
    gone = []
    for owner, name, parameters in PRIVATE_EDGE:
        member = getattr(owner, name, None)
        known = set(inspect.signature(member).parameters) if callable(member) else set()
        if member is None or not set(parameters) <= known:
            gone.append(f"{owner.__name__}.{name}({', '.join(parameters)})")
    if not {"state", "has_new_token", "query_length"} <= set(requests.FutureRequestState.__slots__):
        gone.append("FutureRequestState.__slots__")
    return gone


def test_the_installed_transformers_is_the_one_the_edge_was_written_against() -> None:
    batching_edge.check_version()


def test_another_transformers_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching_edge.transformers, "__version__", "5.24.0")
    with pytest.raises(EngineIncompatible, match=r"5\.23\.0.*5\.24\.0"):
        batching_edge.check_version()


def test_a_model_with_sliding_windows_is_refused_by_name(model_dir: Path, plan: Plan) -> None:
    model, _ = load_base_model(model_dir, torch.float32, "sdpa")
    adapt_model(model, plan, verify_a(plan))
    model.config.sliding_window = 64
    with pytest.raises(EngineIncompatible, match="sliding_attention"):
        TransformersEngine(model, plan, OpenGuard(), [2])


def test_every_private_name_is_where_the_edge_expects_it() -> None:
    assert missing_edge() == []


def test_a_moved_name_is_reported_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    # One that no running worker calls: other engines of this process are alive meanwhile.
    monkeypatch.delattr(continuous_api.ContinuousBatchingManager, "_create_batch_processor")
    assert missing_edge() == ["ContinuousBatchingManager._create_batch_processor()"]


def test_the_worker_still_works_in_the_order_the_edge_relies_on() -> None:
    """Tokens are handed over after the step; pauses and cancellations take effect before the next."""
    body = inspect.getsource(continuous_api.ContinuousBatchingManager._generation_loop_body)
    assert body.index("prepare_next_batch()") < body.index("self._generation_step()") < body.index("update_batch()")
    prepare = inspect.getsource(continuous_api.ContinuousBatchProcessor.prepare_next_batch)
    order = ["_update_tp_group_state()", "clear_cancelled_requests()", "schedule_batch(", "prepare_batch_tensors("]
    assert [prepare.index(step) for step in order] == sorted(prepare.index(step) for step in order)
    tensors = inspect.getsource(input_outputs.ContinuousBatchingIOs.prepare_batch_tensors)
    assert "for i, future_state in enumerate(requests_in_batch)" in tensors  # cu_seq_lens_q follows this order


def test_a_batch_is_described_to_the_engine_as_it_is(model_dir: Path, plan: Plan) -> None:
    """Chunked prefill mixed with decoding: positions continue, lengths add up, only complete prompts predict."""
    texts = [text * 2 for text in prompts(4, seed=3)] + [[5], [6]]

    async def serve() -> list[batching_edge.Batch]:
        engine = build_engine(model_dir, plan, max_batch_tokens=16, max_concurrent=6)
        seen: list[batching_edge.Batch] = []
        begin = engine.steps.begin
        engine.steps.begin = lambda batch: (seen.append(batch), begin(batch))[1]  # type: ignore[method-assign]
        await engine.start()
        await asyncio.gather(*(ask(engine, f"r{i}", text, [], max_tokens=4) for i, text in enumerate(texts)))
        await engine.stop()
        return seen

    seen = run(serve())
    position = dict.fromkeys((f"r{i}" for i in range(len(texts))), 0)
    for batch in seen:
        assert batch.tokens == sum(one.length for one in batch.slices) <= 16
        for one in batch.slices:
            assert one.position == position[one.request_id]
            position[one.request_id] += one.length
            assert one.predicts == (position[one.request_id] >= len(texts[int(one.request_id[1:])]))
    assert max(len(batch.slices) for batch in seen) > 1
    assert any({one.predicts for one in batch.slices} == {True, False} for batch in seen)


def test_only_the_worker_computes_with_many_threads(model_dir: Path, plan: Plan) -> None:
    before, seen = torch.get_num_threads(), list[int]()

    async def serve() -> None:
        engine = build_engine(model_dir, plan, threads=3)
        begin = engine.steps.begin
        engine.steps.begin = lambda batch: (seen.append(torch.get_num_threads()), begin(batch))[1]  # type: ignore[method-assign]
        await engine.start()
        await ask(engine, "one", prompts(1)[0], [], max_tokens=2)
        await engine.stop()

    try:
        run(serve())
        assert set(seen) == {3}
        with ThreadPoolExecutor(1) as other:
            assert other.submit(torch.get_num_threads).result() == 1
    finally:
        torch.set_num_threads(before)


def test_a_failed_step_ends_its_requests_and_the_worker_goes_on(model_dir: Path, plan: Plan) -> None:
    async def serve() -> tuple[Failed | Finished | None, Failed | Finished | None, bool]:
        engine = build_engine(model_dir, plan)
        one = resident(plan, "alpha", 1)
        await engine.start()
        await engine.load(one.key, one.adapter, one.statistics)
        layer = engine._edge._model.model.layers[1].mlp
        broken = layer.register_forward_pre_hook(lambda *_: 1 / 0)
        first = await ask(engine, "broken", prompts(1)[0], [one.key])
        broken.remove()
        second = await ask(engine, "whole", prompts(1)[0], [one.key])
        alive = engine.info().alive
        await engine.stop()
        return first.end, second.end, alive

    first, second, alive = run(serve())
    assert isinstance(first, Failed) and first.code == "generation_failed"
    assert "ZeroDivision" not in first.message
    assert isinstance(second, Finished) and alive


@pytest.mark.parametrize("seen_in_time", [True, False])
def test_a_prompt_for_a_stopped_worker_is_refused_and_no_token_of_it_is_logged(
    model_dir: Path,
    plan: Plan,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    seen_in_time: bool,
) -> None:
    async def serve() -> None:
        engine = build_engine(model_dir, plan)
        await engine.start()
        await ask(engine, "whole", [5], [])
        await engine.stop()
        if not seen_in_time:
            monkeypatch.setattr(batching_edge.BatchingEdge, "alive", True)
        with pytest.raises(EngineStopped, match="has stopped"):
            await ask(engine, "late", [77, 88, 99], [])

    adopt("ContinuousBatchingLogger")
    run(serve())
    assert not any(token in record.getMessage() for record in caplog.records for token in ("77", "88", "99"))


def test_the_librarys_log_cannot_name_a_generated_token(
    model_dir: Path, plan: Plan, caplog: pytest.LogCaptureFixture
) -> None:
    build_engine(model_dir, plan)
    adopt("ContinuousBatchingLogger")
    state = requests.RequestState("r", [5], max_new_tokens=1)
    state._new_tokens_limit, state._status = 0, requests.RequestStatus.DECODING
    assert state.update_and_check_completion(77, None)
    assert not any("77" in record.getMessage() for record in caplog.records)


def test_a_worker_that_cannot_finish_any_step_is_reported_dead(model_dir: Path, plan: Plan) -> None:
    async def serve() -> bool:
        engine = build_engine(model_dir, plan)
        await engine.start()
        engine._edge._model.model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
        for i in range(batching_edge.MAX_FAILED_STEPS + 1):
            await ask(engine, f"r{i}", [5], [])
        for _ in range(100):
            if not engine.info().alive:
                break
            await asyncio.sleep(0.02)
        return engine.info().alive

    assert run(serve()) is False
