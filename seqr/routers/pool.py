"""The adapters that routers choose among: any LoRA library of one base model, with a shared A or with one A each."""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from functools import cached_property

import torch

from seqr.errors import SeqrError


class PoolMismatch(SeqrError):
    """An adapter of another rank, other shapes or other modules than the first one of its pool."""

    code = "pool_mismatch"


@dataclass(frozen=True)
class LoraFactors:
    """One adapter in one module: a fp32 [r, n] and b fp32 [m, r] with the LoRA scale folded in, so that dW = b a."""

    a: torch.Tensor
    b: torch.Tensor


Factors = Mapping[str, LoraFactors]


class AdapterPool:
    """N adapters stacked per module, in the order given; ``modules`` in the order of the first one.

    a: per module fp32 [r, n] when all adapters share A (``shared``), else [N, r, n]; b_t: per module fp32 [N, r, m].
    N may be 0. kept_r: what ``seqr.routers.norms.r_factors`` has computed, fp32 [N, r, r] by module. Raises
    ``PoolMismatch``.
    """

    def __init__(self, adapters: Mapping[str, Factors], modules: tuple[str, ...] | None = None):
        self.names = tuple(adapters)
        first = next(iter(adapters.values()), {})
        self.modules = tuple(first) if modules is None else modules
        for name, adapter in adapters.items():
            self._check(name, adapter, first)
        each = list(adapters.values())
        self.shared = all(
            torch.equal(adapter[module].a, first[module].a) for adapter in each for module in self.modules
        )
        self.a: list[torch.Tensor] = []
        self.b_t: list[torch.Tensor] = []
        for module in self.modules if each else ():
            a = [adapter[module].a.to(torch.float32) for adapter in each]
            self.a.append(a[0].contiguous() if self.shared else torch.stack(a))
            self.b_t.append(torch.stack([adapter[module].b.to(torch.float32).T for adapter in each]).contiguous())
        self.kept_r: dict[int, torch.Tensor] = {}

    def to(self, device: torch.device | str) -> "AdapterPool":
        """This pool with its tensors on ``device``; the names, modules and numbers stay."""
        moved = copy(self)
        moved.a, moved.b_t = ([tensor.to(device) for tensor in part] for part in (self.a, self.b_t))
        moved.kept_r = {}
        return moved

    @cached_property
    def finite(self) -> bool:
        """Whether every B is finite."""
        return all(bool(torch.isfinite(b_t).all()) for b_t in self.b_t)

    def __len__(self) -> int:
        return len(self.names)

    def column(self, name: str) -> int:
        """The column of an adapter; raises ``PoolMismatch`` for a name that is not here."""
        if name not in self.names:
            raise PoolMismatch(f"there is no adapter {name} in this pool; it has {', '.join(self.names) or 'none'}")
        return self.names.index(name)

    def _check(self, name: str, adapter: Factors, first: Factors) -> None:
        if set(adapter) != set(self.modules):
            odd = sorted(set(adapter) ^ set(self.modules))
            raise PoolMismatch(f"adapter {name} differs from the first one in whether it adapts {odd[0]}")
        for module in self.modules:
            got, expected = _shapes(adapter[module]), _shapes(first[module])
            if got != expected:
                raise PoolMismatch(f"adapter {name} has A, B of shapes {got} in {module}; the first one has {expected}")


def _shapes(factors: LoraFactors) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(factors.a.shape), tuple(factors.b.shape)
