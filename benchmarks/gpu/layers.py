"""Decoder layers of a Llama's shapes with random weights: bare, and with the four attention Linears routed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from seqr.kernels.routed_site import RoutedSite


@dataclass(frozen=True)
class Shapes:
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    mlp: int = 14336
    layers: int = 4
    rank: int = 16

    @property
    def head(self) -> int:
        return self.hidden // self.heads

    @property
    def qkv(self) -> tuple[int, int, int]:
        return self.hidden, self.kv_heads * self.head, self.kv_heads * self.head


LLAMA_8B = Shapes()
TINY = Shapes(hidden=64, heads=4, kv_heads=2, mlp=96, layers=1, rank=4)


def _rope(qk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """qk [T, heads, d] turned by its position: cos, sin [T, 1, d / 2]."""
    one, other = qk.float().chunk(2, dim=-1)
    return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1).to(qk.dtype)


def _gate(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _add_norm(x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x + delta
    wide = x.float()
    return x, (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * weight


def compile_small_ops(shapes: Shapes, device: torch.device) -> str:
    """Fuse the elementwise work, as an engine would, so that the bare layers are no slow baseline. Says what it did."""
    names = ("_rope", "_gate", "_add_norm")
    eager = {name: globals()[name] for name in names}
    globals().update({name: torch.compile(f, dynamic=False) for name, f in eager.items()})
    x = torch.randn(2, 2 * shapes.mlp, dtype=torch.bfloat16, device=device)
    turn = torch.randn(2, 1, shapes.head // 2, device=device)
    try:
        _gate(x)
        _add_norm(x, x, x[0])
        _rope(x[:, : 2 * shapes.head].reshape(2, 2, shapes.head), turn, turn)
    except Exception as error:  # noqa: BLE001 - whatever a compiler raises, the eager form remains
        globals().update(eager)
        return f"eager ({type(error).__name__} from torch.compile)"
    return "torch.compile"


class Layer(nn.Module):
    """x + o(attention(qkv(norm x))), then + down(silu(gate) * up): a pre-norm decoder layer with grouped queries."""

    def __init__(self, shapes: Shapes, index: int, device: torch.device):
        super().__init__()
        self.shapes = s = shapes

        def linear(inputs: int, outputs: int) -> nn.Linear:
            made = nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16, device=device)
            made.weight.requires_grad_(False).normal_(0.0, inputs**-0.5)
            return made

        a = [torch.randn(s.rank, s.hidden, device=device) / s.hidden**0.5 for _ in range(4)]
        weights = [linear(s.hidden, width) for width in s.qkv], [linear(s.hidden, s.hidden)]
        parts = a[:3], a[3:]
        self.sites: dict[str, list[RoutedSite]] = {}
        for name, options in {"plain": {}, "overlap": {"overlap": True}, "stacked": {"stacked": True}}.items():
            self.sites[name] = [
                RoutedSite(weights[i], parts[i], 2 * index + i, 4 * index + 3 * i, **options) for i in range(2)
            ]
        self.qkv = torch.cat([part.weight for part in weights[0]])
        self.o = weights[1][0].weight
        self.gate_up = linear(s.hidden, 2 * s.mlp).weight
        self.down = linear(s.mlp, s.hidden).weight
        self.norms = torch.ones(2, s.hidden, dtype=torch.bfloat16, device=device)

    def forward(
        self, x: torch.Tensor, delta: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor],
        attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor], how: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """x, delta [T, hidden]: the stream and what the layer before adds to it; ``how``: "bare" or a key of sites."""
        s = self.shapes
        x, h = _add_norm(x, delta, self.norms[0])
        qkv = F.linear(h, self.qkv) if how == "bare" else self.sites[how][0](h)
        heads = qkv.view(-1, s.heads + 2 * s.kv_heads, s.head)
        turned = _rope(heads[:, : s.heads + s.kv_heads], *turn)
        mixed = attend(turned[:, : s.heads], turned[:, s.heads :], heads[:, s.heads + s.kv_heads :])
        o = F.linear(mixed, self.o) if how == "bare" else self.sites[how][1](mixed)
        x, h = _add_norm(x, o, self.norms[1])
        return x, F.linear(_gate(F.linear(h, self.gate_up)), self.down)


class Stack:
    """Layers with a KV cache of ``context`` tokens for each of ``sequences``, or for one prefill of as many tokens."""

    def __init__(self, layers: list[Layer], tokens: int, context: int, device: torch.device):
        self.layers, self.shapes, self.context = layers, layers[0].shapes, context
        s = self.shapes
        self.x = torch.randn(tokens, s.hidden, dtype=torch.bfloat16, device=device)
        self.nothing = torch.zeros_like(self.x)
        position = (
            torch.arange(tokens, device=device) if context == 0 else torch.full((tokens,), context - 1, device=device)
        )
        angle = position[:, None, None] * 500000.0 ** (-torch.arange(0, s.head, 2, device=device) / s.head)
        self.turn = angle.cos(), angle.sin()
        shape = (len(layers), 2, tokens, s.kv_heads, context, s.head)
        self.cache = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_()

    def run(self, how: str) -> torch.Tensor:
        x, delta = self.x, self.nothing
        for index, layer in enumerate(self.layers):
            x, delta = layer(x, delta, self.turn, self._attend(index), how)
        return x + delta

    def _attend(self, index: int) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
        s, attention = self.shapes, F.scaled_dot_product_attention

        def prefill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
            out: Any = attention(q, k, v, is_causal=True, enable_gqa=True)
            return out[0].transpose(0, 1).reshape(-1, s.hidden)

        def decode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            keys, values = self.cache[index]
            keys[:, :, self.context - 1], values[:, :, self.context - 1] = k, v
            # The queries that share a key head, as rows of one query: the cache is read once.
            grouped = q.reshape(q.shape[0], s.kv_heads, s.heads // s.kv_heads, s.head)
            return attention(grouped, keys, values).reshape(-1, s.hidden)

        return prefill if self.context == 0 else decode
