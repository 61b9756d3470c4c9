"""Tensors that say they are on a GPU and compute on the CPU: what mixes devices fails here as it would on a card.

The numbers are the CPU's. What only a card has (streams, its kernels, its memory) is not pretended.
"""

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda:0")
# Both sides may be on different devices.
_COPIES = (torch.Tensor.copy_, torch.Tensor.to, torch.Tensor.cpu)
_INDEXED = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)


class OnGpu(torch.Tensor):
    """A tensor of ``GPU`` whose numbers are ``real``'s."""

    numbers: torch.Tensor

    @staticmethod
    def __new__(cls, real: torch.Tensor) -> "OnGpu":
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, real.size(), real.stride(), real.storage_offset(), dtype=real.dtype, device=GPU
        )
        made.numbers = real
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnGpu({self.numbers!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What does not pass through Python's functions: properties such as ``T``, and detaching."""
        _same_device(func, args, kwargs)
        args, kwargs = tree_map(_on_cpu, (args, kwargs or {}))
        return tree_map(lambda t: OnGpu(t) if isinstance(t, torch.Tensor) else t, func(*args, **kwargs))


class PretendGpu(TorchFunctionMode):
    """Makes what asks for a tensor on a GPU an ``OnGpu``, and computes with those. A mode of this thread."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        ours = [t for t in tree_leaves((args, kwargs)) if isinstance(t, OnGpu)]
        places = [kwargs.get("device"), *(args[1:2] if func is torch.Tensor.to else ())]
        target = next((torch.device(p) for p in places if isinstance(p, str | torch.device)), None)
        if getattr(func, "__name__", "") == "__get__" or (not ours and (target is None or target.type != "cuda")):
            return func(*args, **kwargs)
        if func is torch.Tensor.numpy:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func not in _COPIES:
            # Of a tensor on a GPU, indices may be anywhere.
            indexed = func in _INDEXED and isinstance(args[0], OnGpu)
            _same_device(func, (args[0], *args[2:]) if indexed else (args, kwargs))
        leaves = func is torch.Tensor.cpu or (target is not None and target.type == "cpu")
        here = ours if target is None and func is not torch.Tensor.cpu else []
        if func in _COPIES and not isinstance(args[0], OnGpu):
            leaves = leaves or target is None
        kwargs.pop("pin_memory", None)
        args, kwargs = tree_map(_on_cpu, (args, kwargs))
        out = func(*args, **kwargs)
        if leaves:
            return tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, out)
        known = {id(t.numbers): t for t in here}
        return tree_map(lambda t: known.get(id(t), OnGpu(t)) if isinstance(t, torch.Tensor) else t, out)


def put_on_gpu(model: nn.Module) -> nn.Module:
    """``model.to("cuda")``; tied parameters stay tied."""
    moved: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                if id(parameter) not in moved:
                    moved[id(parameter)] = nn.Parameter(OnGpu(parameter.detach()), requires_grad=False)
                module._parameters[name] = moved[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = OnGpu(buffer)
    return model


def _same_device(func: Any, *given: Any) -> None:
    tensors = [t for t in tree_leaves(given) if isinstance(t, torch.Tensor)]
    if any(isinstance(t, OnGpu) for t in tensors) and any(not isinstance(t, OnGpu) and t.dim() > 0 for t in tensors):
        shapes = [(type(t).__name__, tuple(t.shape)) for t in tensors]
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} of {shapes}")


def _on_cpu(t: Any) -> Any:
    if isinstance(t, OnGpu):
        return t.numbers
    return torch.device("cpu") if isinstance(t, torch.device) or t == "cuda" else t
