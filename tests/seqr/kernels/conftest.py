"""The kernels run in Triton's interpreter unless there is a GPU; without triton there is nothing to run."""

import importlib.util
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent


def reason_to_skip() -> str:
    """Why the kernels cannot run here, or nothing."""
    if importlib.util.find_spec("triton") is None:
        return "the kernels need triton, which is not installed: pip install triton==3.7.0"
    from triton import knobs
    from triton.runtime.jit import JITFunction

    compiled = isinstance(sys.modules["triton.language"].sum, JITFunction)
    if not knobs.runtime.interpret and not torch.cuda.is_available():
        return "the kernels need a GPU, or TRITON_INTERPRET=1 in the environment before anything imports triton"
    if knobs.runtime.interpret and compiled:
        return "triton was imported before TRITON_INTERPRET=1 was set, so its interpreter cannot run"
    return ""


# test_triton.py then says why.
collect_ignore = [path.name for path in HERE.glob("test_*.py") if path.name != "test_triton.py"] * bool(
    reason_to_skip()
)
