"""The control flow of the script that tries the engine on a card: time there is too dear for typing errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_script_runs_through_at_tiny_sizes(tmp_path: Path) -> None:
    """With the plain layers: the kernels take minutes in the interpreter, and test_kernel_routing.py runs those."""
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_gateway.py", "--tiny", "--out", str(tmp_path)],
        cwd=ROOT, env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_gateway.json").read_text())
    assert found["conformance"]["passed"] and "1 passed" in found["conformance"]["output"]
    first, second = found["speed"]
    assert (first["routing"], second["routing"]) == ("kernels", "torch") and not first["errors"] + second["errors"]
    assert len(first["rows"]) == 10 and len(second["rows"]) == 5
    assert all(row["tokens per second"] > 0 for row in first["rows"])
