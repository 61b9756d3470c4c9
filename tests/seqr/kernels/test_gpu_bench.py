"""The benchmark's control flow, at tiny sizes in the interpreter: time on a card is too dear for typing errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    found = run(tmp_path, "--only", "decode", "memory", "grid")
    rows = found["decode"]
    assert isinstance(rows, list)
    assert {row["mode"] for row in rows} == {"bare", "per_token", "evidence", "prompt_evidence"}


@pytest.mark.slow
def test_all_of_it_runs_through(tmp_path: Path) -> None:
    assert {"checks", "decode", "prefill", "memory", "grid"} <= set(run(tmp_path))
