"""The benchmark's control flow, at tiny sizes in the interpreter: time on a card is too dear for typing errors."""

import functools
import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

from benchmarks.gpu import timing

ROOT = Path(__file__).parents[3]


def run(out: Path, *arguments: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_bench.py", "--interpret", "--out", str(out), *arguments],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.rstrip().endswith("ALL PASS"), done.stdout + done.stderr
    found: dict[str, object] = json.loads((out / "gpu_bench.json").read_text())
    return found


def test_decode_memory_and_the_grid_run_through(tmp_path: Path) -> None:
    found = run(tmp_path, "--only", "kernels", "decode", "memory", "grid")
    rows = found["decode"]
    assert isinstance(rows, list)
    kernels = found["kernels"]
    assert isinstance(kernels, dict)
    assert "route_evidence_runs" in kernels["prefill 9 N=16"]["alone us"]
    assert {row["mode"] for row in rows} == {"bare", "per_token", "evidence", "prompt_evidence"}


def test_a_captured_graph_keeps_what_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing.torch, "cuda", MagicMock())
    read = torch.ones(3)
    kept = weakref.ref(read)
    replay = timing.captured(functools.partial(torch.sum, read), torch.device("cuda"))
    del read
    replay()
    assert kept() is not None
    del replay
    gc.collect()
    assert kept() is None


@pytest.mark.slow
def test_all_of_it_runs_through(tmp_path: Path) -> None:
    assert {"checks", "kernels", "decode", "prefill", "memory", "grid"} <= set(run(tmp_path))
