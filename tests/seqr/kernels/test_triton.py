"""Where the kernels can run, and that nothing else needs triton."""

import subprocess
import sys

import pytest

from tests.seqr.kernels.conftest import reason_to_skip

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import seqr.library, seqr.routed_linear, seqr.step, seqr.cli
assert not any(name.startswith("seqr.kernels") for name in sys.modules)
"""


def test_the_kernels_can_run_here() -> None:
    if reason_to_skip():
        pytest.skip(reason_to_skip())


def test_nothing_outside_the_kernels_needs_triton() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], check=True, timeout=120)
