"""A model whose Linears add what a ``Router`` chooses: for comparing routers, not for serving."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from seqr.routed_linear import find_linear
from seqr.routers.interface import Activation, Batch, Mixture, Router
from seqr.routers.pool import AdapterPool
from seqr.routing.products import ExactFp32

Observer = Callable[[Activation], None]
# Up to so many adapters a GPU multiplies by all of them sooner than it can be asked which ones are in use.
FEW = 64


class MixtureModel:
    """Puts ``pool`` behind the Linears of ``model`` that it names; ``close`` takes it off again.

    Raises ``ModelMismatch`` when the model lacks such a Linear or has it in another shape.
    """

    def __init__(self, model: nn.Module, pool: AdapterPool):
        self.model = model
        self.pool = pool
        self._router: Router | None = None
        self._observer: Observer | None = None
        linears = [
            find_linear(model, name, a.shape[-1], b_t.shape[-1], "the adapters' pool")
            for name, a, b_t in zip(pool.modules, pool.a, pool.b_t, strict=False)
        ]
        self._handles = [linear.register_forward_hook(self._hook(index)) for index, linear in enumerate(linears)]

    def close(self) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def routed(self, router: Router, batch: Batch, ids: torch.Tensor) -> Iterator[None]:
        """Forward passes inside are routed by ``router``, which has begun ``batch`` (and read it, if it reads).

        ids int64 [S, L]: the batch's tokens, for the reading pass.
        """
        router.begin(batch)
        if router.reads and len(self.pool):
            with self.observed(router.read):
                hidden_states(self.model, ids, batch)
        self._router = router
        try:
            yield
        finally:
            self._router = None

    @contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        """Forward passes inside are the base model's, and ``observer`` sees every module's activation."""
        self._observer = observer
        try:
            yield
        finally:
            self._observer = None

    def _hook(self, index: int) -> Any:
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
            if self._observer is None and self._router is None:
                return y
            x = inputs[0]
            activation = Activation(self.pool, index, x.reshape(-1, x.shape[-1]))
            if self._observer is not None:
                self._observer(activation)
                return y
            mixture = cast(Router, self._router).route(activation)
            return add_mixture(y.reshape(-1, y.shape[-1]), activation, mixture).view_as(y)

        return hook


def hidden_states(model: Any, ids: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The last hidden states [S, L, n] of a causal language model on right-padded ``ids``, without its output head."""
    mask = (torch.arange(batch.width) < batch.lengths[:, None]).to(torch.int64)
    decoder = getattr(model, "base_model", model)
    return cast(torch.Tensor, decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state)


def add_mixture(y: torch.Tensor, activation: Activation, mixture: Mixture) -> torch.Tensor:
    """y + sum of the chosen adapters' shares, computed in fp32 and rounded once to y's dtype: y [T, m] -> [T, m]."""
    pool, module = activation.pool, activation.module
    if y.device.type != "cpu" and len(pool) <= FEW and pool.finite:
        return add_every(y, activation, mixture)
    total: torch.Tensor | None = None
    with ExactFp32(y.device.type):
        for column in sorted(set(mixture.columns.flatten().tolist())):
            if column < 0:
                continue
            weight = mixture.weights.masked_fill(mixture.columns != column, 0.0).sum(1)
            rows = (mixture.columns == column).any(1).nonzero()[:, 0]
            z = activation.z if pool.shared else activation.z[:, column]
            share = (z[rows] @ pool.b_t[module][column]) * weight[rows, None]
            if total is None:
                total = y.to(torch.float32, copy=True)
            total.index_add_(0, rows, share)
    return y if total is None else total.to(y.dtype)


def add_every(y: torch.Tensor, activation: Activation, mixture: Mixture) -> torch.Tensor:
    """``add_mixture`` as one product over all adapters, most of them weighted 0: the host need not wait for the device.

    Every B must be finite.
    """
    pool, module = activation.pool, activation.module
    weight = y.new_zeros(y.shape[0], len(pool) + 1, dtype=torch.float32)
    weight = weight.scatter_add_(1, mixture.columns + 1, mixture.weights)[:, 1:, None]
    with ExactFp32(y.device.type):
        z = activation.z[:, None] if pool.shared else activation.z
        total = y.to(torch.float32) + (weight * z).flatten(1) @ pool.b_t[module].flatten(0, 1)
    return total.to(y.dtype)
