"""The kernels run in Triton's interpreter unless there is a GPU; without triton there is nothing to run."""

import importlib.util
import sys
from functools import cache
from pathlib import Path
from typing import Any

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


def patch_quickly() -> None:
    """Triton's interpreter looks through all of triton.language for builtins whenever a kernel calls a function, which
    is a third of its time; they are the same ones every time.
    """
    from triton.runtime import interpreter

    is_builtin = interpreter.tl.core.is_builtin

    @cache
    def builtins_of(package: Any) -> list[str]:
        return [name for name, member in interpreter.inspect.getmembers(package) if is_builtin(member)]

    def patch(package: Any, builder: Any, scope: Any) -> None:
        for name in builtins_of(package):
            if is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch


if not reason_to_skip():
    patch_quickly()

# test_triton.py then says why.
collect_ignore = [path.name for path in HERE.glob("test_*.py") if path.name != "test_triton.py"] * bool(
    reason_to_skip()
)
