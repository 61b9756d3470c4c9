"""Which base model the demo uses, and which plan suits its data."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from coordinator.demo.federation import PlanChoice
from coordinator.demo.organisations import Organisation

# Enough to learn a silo's records by heart within what one processor core does in two minutes. Many small batches
# learn more of the same work than few large ones: 44 steps of 8 left a loss of 0.001 where 32 of 12 left 0.04. Forty
# answer as many questions as 48 and leave the eight minutes some room on a slow processor.
PASSES = 3.8
MIN_STEPS = 24
MAX_STEPS = 120
PROBES = 20


def choose_model(model: str | None, tiny: bool, root: Path) -> Path:
    """The directory of the base model, made on first use and kept in the user's cache."""
    from seqr.models import build_tiny_model, prepare_base_model
    from seqr.smollm2 import fetch_smollm2

    if tiny:
        return build_tiny_model(root / "models" / "tiny-llama")
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "seqr"
    if model is None:
        return prepare_base_model(fetch_smollm2(cache), cache / "SmolLM2-135M-Instruct")
    if Path(model).is_dir():
        return Path(model).absolute()
    return prepare_base_model(model, cache / Path(model).stem)


def choose_plan(organisations: Sequence[Organisation], tiny: bool, steps: int | None = None) -> PlanChoice:
    """``steps``, or as many as the largest silo's records need; a tiny model trains only for show."""
    if tiny:
        return PlanChoice(rank=4, alpha=8.0, max_steps=steps or 4, batch_size=4, dtype="float32")
    largest = max(len(organisation.records) for organisation in organisations)
    needed = round(PASSES * largest / PlanChoice.batch_size)
    return PlanChoice(max_steps=steps or min(MAX_STEPS, max(MIN_STEPS, needed)), dtype=faster_dtype())


def faster_dtype() -> str:
    """The dtype in which this machine multiplies matrices faster: without AMX or a GPU that is often float32."""
    import torch

    if torch.cuda.is_available():
        return "bfloat16"
    torch.set_num_threads(1)  # as the silos train
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.ones(512, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
        times = []
        for _ in range(PROBES):
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return "bfloat16" if seconds[torch.bfloat16] < seconds[torch.float32] else "float32"
