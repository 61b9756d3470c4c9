"""What makes training repeatable: seeds from plan and silo, deterministic kernels, a fixed number of threads."""

import contextlib
import os
import platform
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch

from seqr.canonical import canonical_json, sha256_hex
from silo_client.config import SiloConfig

# cuBLAS is repeatable only with this set before its first use (NVIDIA cuBLAS documentation, "Results reproducibility").
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def training_seed(plan_id: str, silo_id: str) -> int:
    """The seed of every generator in training: 31 bits of SHA-256 over plan id and silo id."""
    return int(sha256_hex(canonical_json(["seed", plan_id, silo_id]))[:8], 16) & 0x7FFFFFFF


@contextlib.contextmanager
def deterministic(threads: int) -> Iterator[None]:
    """Deterministic kernels and ``threads`` CPU threads inside, the caller's settings again afterwards."""
    fresh: Any = torch.utils.deterministic  # its settings are properties of the module, unknown to its type
    had_threads, had_algorithms = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    had_fill = fresh.fill_uninitialized_memory
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    # Filling fresh memory only helps to find kernels that read it unwritten; it cost 6% of a training step.
    fresh.fill_uninitialized_memory = False
    try:
        yield
    finally:
        fresh.fill_uninitialized_memory = had_fill
        torch.use_deterministic_algorithms(had_algorithms)
        torch.set_num_threads(had_threads)


def environment(config: SiloConfig) -> dict[str, str]:
    """What the adapter's bytes depend on besides plan, silo id and records; part of the manifest."""
    return {
        "python": platform.python_version(),
        "seqr": version("seqr"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "peft": version("peft"),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": config.device,
        "threads": str(config.threads),
    }
