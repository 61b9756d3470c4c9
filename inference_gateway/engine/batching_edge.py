"""The one file that touches what transformers keeps private about continuous batching (written against 5.23.0).

What is used and why:

- ``ContinuousBatchingManager`` is subclassed: a step runs under inference mode, an error in a step ends the requests of
  that step instead of the worker, and the attention is ours (``switch_to_cb_friendly_attn`` knows three names only).
- A forward pre-hook sees ``cu_seq_lens_q`` and ``position_ids`` of the flat batch, and says in which order the cache is
  read (``read_index``); ``requests_in_batch`` names its sequences in the same order, in chunked prefill too.
  ``logits_processor_args`` would not do: it leaves out sequences that get no token in this step.
- A logits processor at the end of the list draws tokens request by request; transformers would sample all alike.
- The output router hands tokens over on the worker's thread, once per step, before anybody else sees them.
- Cache blocks are shared by transformers' ledger, but under names of ours: its own cover the tokens and nothing else.

``tests/inference_gateway/test_batching_edge.py`` fails by name when any of it moves.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import AttentionInterface, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import cache, continuous_api
from transformers.generation.continuous_batching.cache_allocators import FullAttentionCacheAllocator

from inference_gateway.engine import attention, invariant
from inference_gateway.engine.limits import EngineLimits
from inference_gateway.engine.linears import FewRowsLinear, replace_linears
from inference_gateway.engine.prefixes import block_name
from inference_gateway.engine.stepper import Batch, Output, Slice, Stepper
from inference_gateway.errors import EngineIncompatible, EngineStopped
from seqr.step import reset_context, set_context

TRANSFORMERS = "5.23.0"
# A worker that cannot finish a single step is broken; one bad step now and then is not.
MAX_FAILED_STEPS = 5
# What transformers' log would say with tokens in it.
WITH_TOKENS = ("Request with ids", "generated a useless token")
STOPPED = "the engine's worker has stopped; the gateway has to be restarted"

log = logging.getLogger(__name__)


class BatchingEdge:
    """A worker thread that runs the model over whatever requests there are, one step after the other."""

    _stepper: Stepper

    def __init__(self, model: Any, limits: EngineLimits):
        """Raises ``EngineIncompatible`` for another transformers, or a model that is served by no path here."""
        check_version()
        kinds = set(cache.group_layers_by_attn_type(model.config.get_text_config()))
        if kinds != {"full_attention"}:
            raise EngineIncompatible(
                f"the base model has layers of {', '.join(sorted(kinds))}; this engine serves full attention only"
            )
        self._model = model
        self._deterministic = limits.deterministic
        self._on_gpu = model.device.type == "cuda"
        if self._on_gpu:
            # cuDNN plans its attention anew for every shape, and every step brings new lengths.
            torch.backends.cuda.enable_cudnn_sdp(False)
        if limits.deterministic:
            invariant.make_invariant(model)
        elif model.device.type == "cpu" and model.dtype == torch.float32:
            replace_linears(model, FewRowsLinear)
        AttentionInterface.register(attention.NAME, attention.paged_attention)
        AttentionInterface.register(invariant.NAME, invariant.invariant_attention)
        model.set_attn_implementation(invariant.NAME if limits.deterministic else attention.NAME)
        self._manager = _Manager(
            model=model,
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=limits.page_size,
                num_blocks=-(-limits.kv_tokens // limits.page_size),
                max_batch_tokens=max(limits.max_batch_tokens, limits.max_concurrent),
                max_requests_per_batch=limits.max_concurrent,
                max_blocks_per_request=0,
                cpu_offload_space=0.0,
                allow_block_sharing=limits.prefix_sharing,
                use_async_batching=False,
                use_cuda_graph=False,
                auto_switch_to_flash=False,
            ),
        )
        self._manager.edge = self
        logging.getLogger("ContinuousBatchingLogger").addFilter(_names_no_token)
        self.threads = limits.threads
        self._manager.output_router = _Router(self._hand_over)
        self._manager.logit_processor.logits_processor.append(_Picker(self._pick))
        self._manager.logit_processor.do_processing = True
        self._batch: Batch | None = None
        self._hook = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def start(self, stepper: Stepper) -> None:
        """Start the worker, which calls ``stepper``, and wait until it has its cache. Raises ``EngineStopped``."""
        self._stepper = stepper
        self._manager.start()
        thread = self._manager._generation_thread
        while self._manager.batch_processor is None:
            thread.join(timeout=0.01)
            if not thread.is_alive():
                error = self._manager.background_thread_status.fatal_error
                raise EngineStopped(f"the engine's worker did not start: {error}")
        if self.threads is not None:
            # The worker has its own number; this one is that of every thread which has not computed yet, and of this.
            torch.set_num_threads(1)

    def stop(self) -> None:
        """End the worker; requests still running end without another token."""
        if self._manager.is_running():
            self._manager.stop(block=True, hard_stop=True)
        self._hook.remove()

    @property
    def alive(self) -> bool:
        return bool(self._manager.is_running()) and self._manager.background_thread_status.fatal_error is None

    def _require_alive(self) -> None:
        if not self.alive:
            raise EngineStopped(STOPPED)

    def submit(self, request_id: str, prompt: Sequence[int], max_tokens: int, eos: Sequence[int]) -> None:
        """Queue a request; raises ``EngineStopped``."""
        self._require_alive()
        accepted = self._manager.add_request(
            list(prompt), request_id=request_id, max_new_tokens=max_tokens, streaming=True, eos_token_id=list(eos)
        )
        if accepted is None:
            raise EngineStopped(STOPPED)
        self._require_alive()

    def cancel(self, request_id: str) -> None:
        """Drop a request before the next step."""
        self._manager.cancel_request(request_id)

    def drop(self, request_id: str) -> None:
        """Drop a request so that it is in no further step. Only while paused."""
        self._manager.batch_processor.scheduler.set_request_cancellation(request_id)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Hold the worker between two steps. Raises ``EngineStopped``."""
        self._require_alive()
        with self._manager.pause():
            yield

    @property
    def _blocks(self) -> FullAttentionCacheAllocator:
        """The allocator of KV blocks: one, as all layers are of full attention."""
        (allocator,) = self._manager.batch_processor.cache.cache_allocators.values()
        return allocator

    def wipe_cache(self, keep: Sequence[str]) -> None:
        """Zero every KV block that no request in ``keep`` holds. Only while paused."""
        content = self._blocks._copy_view
        unused = torch.ones(content.shape[0], dtype=torch.bool, device=content.device)
        for request_id in keep:
            unused[self.cached_blocks(request_id)] = False
        content[unused] = 0

    def forget_prefixes(self) -> None:
        """Let no request find a block that was filled before now. Only while paused."""
        blocks = self._blocks
        blocks.pool.free_blocks(blocks.index, blocks.ledger.evict_cached_blocks())
        blocks.ledger.hash_to_block.clear()
        blocks.ledger.block_to_hash.clear()

    def kv_blocks(self) -> tuple[int, int]:
        """How many KV blocks there are, and how many of them running requests hold; (0, 0) before the start."""
        if self._manager.batch_processor is None:
            return 0, 0
        blocks = self._blocks
        free = blocks.pool.num_free_sectors * blocks.blocks_per_sector + blocks.pool.count_free_blocks(blocks.index)
        return blocks.num_blocks, blocks.num_blocks - free - len(blocks.ledger.cached_blocks)

    def cached_blocks(self, request_id: str) -> list[int]:
        """The KV blocks that a request holds now."""
        return list(self._blocks.block_table.get(request_id, []))

    def _before_forward(self, _model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if "cache" not in kwargs:  # a plain forward pass, not the worker's
            return args, kwargs
        if self._on_gpu:
            # This runs on transformers' own stream. The batch was written on the default one, where other threads put
            # libraries and permission rows, too; nobody else waits for it.
            torch.cuda.current_stream(self._model.device).wait_stream(torch.cuda.default_stream(self._model.device))
        pending = self._manager.batch_processor.inputs_and_outputs.requests_in_batch
        lengths = kwargs["cu_seq_lens_q"].diff().tolist()
        starts = kwargs["cu_seq_lens_q"].tolist()
        positions = kwargs["position_ids"][0].tolist()
        if [future.query_length for future in pending] != lengths:
            raise EngineIncompatible(f"the batch has sequences of {lengths} tokens, not those of its requests")
        slices = tuple(
            Slice(future.state.request_id, positions[start], length, future.has_new_token)
            for future, start, length in zip(pending, starts, lengths, strict=False)
        )
        self._batch = Batch(slices, kwargs["input_ids"].shape[1])
        set_context(self._stepper.begin(self._batch))
        keys = [one.position + one.length for one in slices]
        if self._deterministic:
            kwargs["sequence_lengths"] = tuple(zip(lengths, keys, strict=True))
        else:
            split = attention.split_batch(lengths, keys, kwargs["input_ids"].device)
            if split.order is not None:
                # The keys come out of the cache as the attention wants them, instead of being sorted in every layer.
                kwargs["read_index"] = [index[split.order] for index in kwargs["read_index"]]
            kwargs["batch_split"] = split
        return args, kwargs

    def _step(self, forward: Callable[[], None]) -> None:
        try:
            # Inference mode only on the CPU: there it saves 10% of a step, and nothing outlives the step.
            with torch.inference_mode(self._model.device.type == "cpu"):
                forward()
            self._stepper.completed()
            self._manager.failed_steps = 0
        except Exception as error:
            self._stepper.failed(error)
            if self._on_gpu:
                # What is still under way must not read the next batch's write indices.
                torch.cuda.synchronize(self._model.device)
            raise _StepFailed from error
        finally:
            reset_context()
            self._batch = None

    def _pick(self, logits: torch.Tensor) -> None:
        if self._batch is not None:
            predicting = [one.request_id for one in self._batch.slices if one.predicts]
            self._stepper.pick(predicting, logits[: len(predicting)])

    def _hand_over(self, outputs: Sequence[Any]) -> None:
        self._stepper.deliver([Output(o.request_id, o.generated_tokens, o.is_finished(), o.error) for o in outputs])

    def _name_blocks(self, paged: cache.PagedAttentionCache) -> None:
        """Have the cache look up and register blocks under the names that the engine gives them."""
        (blocks,) = paged.cache_allocators.values()
        page, ledger = int(blocks.tokens_per_page), blocks.ledger

        def find(request_id: str, prompt: list[int]) -> int:
            given = self._stepper.prefix_chain(request_id)
            if given is None:
                return 0
            chain, reach = given
            del chain[1:]
            found: list[int] = []
            for start in range(0, reach - page + 1, page):
                name = block_name(chain[-1], prompt[start : start + page])
                if name not in ledger.hash_to_block:
                    break
                chain.append(name)
                found.append(ledger.hash_to_block[name])
            if found:
                blocks.acquire_prefix_blocks(request_id, len(found) * page, found)
            return len(found) * page

        def register(state: Any, complete: dict[str, int]) -> None:
            given = self._stepper.prefix_chain(state.request_id)
            if given is None or not complete:
                return
            (count,), (chain, _) = complete.values(), given
            tokens = state.initial_tokens + state.generated_tokens
            for block in range(len(chain) - 1, len(chain) - 1 + count):
                chain.append(block_name(chain[-1], tokens[block * page : (block + 1) * page]))
                ledger.register_new_hash(blocks.block_table[state.request_id][block], chain[-1])

        # The cache's own registers nothing in a request's last step: with asynchronous batches its blocks may be gone.
        paged.search_prefix_match, paged.mark_complete_blocks = find, register


class _StepFailed(Exception):
    """A step did not finish; its cause has been told to the engine."""


class _Manager(continuous_api.ContinuousBatchingManager):  # type: ignore[misc]
    """The worker, made to survive a failed step."""

    edge: BatchingEdge
    failed_steps = 0

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        """Keep the attention that was set: transformers would refuse a name it does not know."""

    def _create_batch_processor(self) -> Any:
        if self.edge.threads is not None:
            torch.set_num_threads(self.edge.threads)
            torch.get_num_threads()  # without this the thread would take over the next number set anywhere
        processor = super()._create_batch_processor()
        if processor.cache.use_prefix_sharing:
            self.edge._name_blocks(processor.cache)
        _let_in_again(processor.scheduler)
        return processor

    def _generation_step(self) -> None:
        self.edge._step(super()._generation_step)

    def _generation_loop_body(self, batch_processor: Any, bootstrapping: bool) -> bool:
        try:
            return bool(super()._generation_loop_body(batch_processor, bootstrapping))
        except _StepFailed as error:
            log.exception("a step failed; its requests end")
            batch_processor.handle_batch_error(error)
        except Exception as error:
            log.exception("the worker could not prepare or end a step; all requests end")
            batch_processor.fail_all_requests(error)
        self.failed_steps += 1
        if self.failed_steps > MAX_FAILED_STEPS:
            raise EngineStopped(f"{self.failed_steps} steps failed in a row")
        return True


def _let_in_again(schedule: Any) -> None:
    """Have a cancelled request make room for new ones, as a finished one does.

    After a preemption the library lets nobody in before a request has finished, and takes no notice of one that is
    cancelled, which is how all but the natural ends come about here: none left, it would let nobody in ever again.
    """
    clear = schedule.clear_cancelled_requests

    def clear_and_let_in() -> list[Any]:
        cleared: list[Any] = clear()
        if cleared or not schedule.active_requests:
            schedule.block_new_requests = False
        return cleared

    schedule.clear_cancelled_requests = clear_and_let_in


class _Router(continuous_api.OutputRouter):  # type: ignore[misc]
    """Hands outputs to one place, on the worker's thread."""

    def __init__(self, sink: Callable[[Sequence[Any]], None]):
        super().__init__()
        self._sink = sink

    def deliver(self, output: Any) -> None:
        self._sink([output])

    def deliver_batch(self, outputs: list[Any]) -> None:
        self._sink(outputs)


class _Picker:
    """A logits processor that transformers keeps, because it says that it supports continuous batching."""

    supports_continuous_batching = True

    def __init__(self, pick: Callable[[torch.Tensor], None]):
        self._pick = pick

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._pick(scores)
        return scores


def _names_no_token(record: logging.LogRecord) -> bool:
    return not any(words in record.getMessage() for words in WITH_TOKENS)


def check_version() -> None:
    """Raises ``EngineIncompatible`` unless this is the transformers whose private edge is used here."""
    if transformers.__version__ != TRANSFORMERS:
        raise EngineIncompatible(
            f"this gateway drives transformers {TRANSFORMERS}, but {transformers.__version__} is installed; "
            f"install transformers=={TRANSFORMERS}"
        )
