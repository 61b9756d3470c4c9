"""Compile every kernel for sm_90 (H100, H200) without a GPU, and tell registers, spills and which arithmetic is used.

    python benchmarks/gpu_compile.py --ranks 16 --adapters 1024

Takes seconds per kernel. Exit status 1 if a kernel spills registers or holds a TF32 instruction.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from seqr.kernels.candidates import Candidates
from seqr.kernels.evidence_decode import route_evidence
from seqr.kernels.evidence_prefill import Chunks, route_evidence_runs
from seqr.kernels.expand import expand_groups, expand_tokens
from seqr.kernels.group import group
from seqr.kernels.project import Projection, project
from seqr.kernels.route import route_tokens
from seqr.kernels.tables import SiteTables
from seqr.routing.features import feature_count

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
INPUTS = 4096


class Sm90:
    """As much of a driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compiling(seen: dict[bytes, str], faults: list[str]) -> Callable[[Any, Any], Callable[..., None]]:
    """What ``kernel[grid]`` becomes: compile for the arguments given, and tell what came out."""

    def of(kernel: Any, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            made = kernel.run(*args, grid=grid, warmup=True, **options)
            cubin, ptx = made.asm["cubin"], made.asm["ptx"]
            if cubin in seen:
                return
            seen[cubin] = kernel.__name__
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(cubin)
                file.flush()
                usage = subprocess.run(
                    [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
                )
            registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups()  # type: ignore[union-attr]
            words = ("wgmma.mma", "mma.sync", "cp.async.c", "bar.sync", "fma.rn.f32", "sqrt.rn", "tf32")
            counts = {word: ptx.count(word) for word in words}
            sizes = f"registers {registers:>3} stack {stack:>3} shared {made.metadata.shared:6}"
            print(f"{kernel.__name__:24} {sizes} {counts}", flush=True)
            if int(stack) or counts["tf32"]:
                faults.append(kernel.__name__)

        return launch

    return of


def site(rank: int, adapters: int, outputs: tuple[int, ...], dtype: torch.dtype) -> SiteTables:
    modules = len(outputs)
    gram = torch.empty(modules, adapters // 64, feature_count(rank), 64)
    return SiteTables.of(gram, torch.empty(modules, adapters), torch.empty(4, rank, sum(outputs), dtype=dtype), outputs)


def every_kernel(
    rank: int, adapters: int, outputs: tuple[int, ...], x_dtype: torch.dtype, b_dtype: torch.dtype
) -> None:
    """Each launch that a site makes, in decode and in prefill."""
    tables, modules = site(rank, adapters, outputs, b_dtype), len(outputs)
    weight = Projection.of(torch.zeros(modules * rank, INPUTS))
    bits = torch.zeros(3, adapters // 32, dtype=torch.int32)
    sums = torch.zeros(modules, 3, adapters, dtype=torch.float64)
    for tokens in (64, 2048):
        row, counts = torch.zeros(tokens, dtype=torch.int32), torch.zeros(tokens, dtype=torch.int8)
        value = torch.zeros(tokens, adapters, dtype=torch.float64)
        y = torch.empty(tokens, sum(outputs), dtype=torch.bfloat16)
        z = project(torch.empty(tokens, INPUTS, dtype=x_dtype), weight)
        found, summed = route_tokens(z, tables, bits, row)
        if tokens == 64:
            for first in (True, False):
                gathered, _ = route_evidence(z, tables, bits, row, row, counts, sums, value, first)
            record = torch.zeros(modules, tokens, dtype=torch.int32)
            for choice in (found, gathered, Candidates.settled(row, modules)):
                expand_tokens(y, z if choice.splits == 1 else summed, tables, choice, record=record)
            expand_tokens(y, summed, tables, found, source=torch.empty(tokens, sum(outputs)))
        else:
            chunks = Chunks.of([tokens], [0], row.device)
            route_evidence_runs(z, tables, bits, row, chunks, counts, sums, value, False).choice()
            expand_groups(y, z, tables, group(torch.zeros(modules, tokens, dtype=torch.int32), adapters))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--adapters", type=int, nargs="+", default=[64, 1024])
    args = parser.parse_args()
    seen: dict[bytes, str] = {}
    faults: list[str] = []
    driver.set_active(Sm90())
    JITFunction.__getitem__ = compiling(seen, faults)
    print(f"triton {triton.__version__}, sm_90")
    for rank in args.ranks:
        for adapters in args.adapters:
            every_kernel(rank, adapters, (4096, 1024, 1024), torch.bfloat16, torch.bfloat16)
            every_kernel(rank, adapters, (4096,), torch.float32, torch.float32)
    print(f"{len(seen)} kernels; {'none spills, no TF32' if not faults else 'FAULTS: ' + ', '.join(faults)}")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
