"""Nothing outside the kernels needs Triton."""

import subprocess
import sys

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import seqr.library, seqr.routed_linear, seqr.step, seqr.cli
assert not any(name.startswith("seqr.kernels") for name in sys.modules)
"""


def test_nothing_outside_the_kernels_needs_triton() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], check=True, timeout=120)
