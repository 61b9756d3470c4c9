"""The peers of this Python: transformers' ``generate`` on a static batch, bare and with peft's Arrow model."""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from seqr.bench.errors import BenchPeerMissing
from seqr.bench.gateway.engines import Load
from seqr.bench.gateway.sample import Sample
from seqr.bench.gateway.shelf import random_b
from seqr.models import load_base_model
from seqr.plan import Plan


class _Clock(StoppingCriteria):  # type: ignore[misc]
    """Stops nothing; notes when the first token was there."""

    def __init__(self) -> None:
        self.first = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_more: Any) -> torch.Tensor:
        self.first = self.first or time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Static:
    """``generate`` over all prompts in one batch that nobody joins or leaves: greedy, always the full length."""

    def __init__(self, model: Any, load: Load):
        self._model = model
        self._load = load
        self._ids = torch.tensor(load.prompts, device=model.device)

    async def run(self) -> Sample:
        """One batch; nothing else runs in this process meanwhile."""
        clock, tokens = _Clock(), self._load.tokens
        wall, cpu = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            out = self._model.generate(
                input_ids=self._ids,
                attention_mask=torch.ones_like(self._ids),
                do_sample=False,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([clock]),
            ).cpu()
        seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
        made = out.shape[0] * (out.shape[1] - self._ids.shape[1])
        return Sample(seconds, cpu_seconds, made, (clock.first - wall,) * out.shape[0])


async def plain(path: Path, load: Load, threads: int) -> Static:
    """The base model alone."""
    torch.set_num_threads(threads)
    return Static(load_base_model(path, getattr(torch, load.dtype), "sdpa")[0], load)


async def arrow(path: Path, plan: Plan, load: Load, count: int, threads: int, scratch: Path) -> Static:
    """peft's Arrow over ``count`` adapters of the plan's rank and Linears, top_k 1. Raises ``BenchPeerMissing``.

    ``scratch``: a folder for the checkpoints that peft reads, which are gone afterwards.
    """
    try:
        from peft import ArrowConfig, LoraConfig, create_arrow_model, get_peft_model
    except ImportError:
        raise BenchPeerMissing("peft's Arrow was not measured: pip install 'seqr[silo]'") from None
    torch.set_num_threads(threads)
    dtype = getattr(torch, load.dtype)
    names = [spec.name for spec in plan.modules]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        config = LoraConfig(r=plan.rank, lora_alpha=plan.alpha, target_modules=names, init_lora_weights=False)
        one = get_peft_model(load_base_model(path, dtype, "sdpa")[0], config)
        folders = []
        for index in range(count):
            _redraw(one, plan, index)
            folders.append(str(Path(directory) / str(index)))
            one.save_pretrained(folders[-1])
        del one
        model = create_arrow_model(
            base_model=load_base_model(path, dtype, "sdpa")[0],
            task_specific_adapter_paths=folders,
            arrow_config=ArrowConfig(top_k=1, rng_seed=0),
        )
    return Static(model.eval(), load)


def _redraw(model: Any, plan: Plan, index: int) -> None:
    """Another A and B: B of the trained norm, A uniform as peft draws it."""
    generator = torch.Generator().manual_seed(index)
    base = model.get_base_model()
    with torch.no_grad():
        for spec in plan.modules:
            layer = base.get_submodule(spec.name)
            layer.lora_B["default"].weight.copy_(random_b(spec, plan.rank, generator) / plan.scale)
            layer.lora_A["default"].weight.uniform_(-1.0, 1.0, generator=generator).mul_(spec.in_features**-0.5)
