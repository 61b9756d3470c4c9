"""How much an engine holds, and how it computes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineLimits:
    """How much an engine holds at once, and how it computes.

    ``kv_tokens``: tokens of KV cache, shared by all running requests. ``prefix_sharing``: prompts that begin alike are
    computed once for equal permitted sets and salts, see decision 14. ``deterministic``: an answer's bits do not depend
    on what else is in the batch; slower, and for CPUs only (``engine.invariant``). ``threads``: the engine computes
    with so many, and every other thread of the process with one (decision 16); None leaves torch's settings alone.
    ``kernels``: route with ``seqr.kernels``; None: on a GPU, where Triton is installed.
    """

    max_concurrent: int = 16
    max_batch_tokens: int = 256
    kv_tokens: int = 16_384
    page_size: int = 32
    max_model_length: int | None = None
    prefix_sharing: bool = False
    deterministic: bool = False
    threads: int | None = None
    kernels: bool | None = None
