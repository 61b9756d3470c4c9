"""Products whose bits for one token do not depend on which other tokens, or how many, are computed beside it.

A library of matrix products picks its order of addition by the shape of the whole product. Here every product has one
shape, 16 rows by the weight, filled up with zeros, and attention works through blocks of 64 keys counted from the
sequence's beginning: whatever the batch, the chunks of a prompt or the token's place in them, the same additions are
done in the same order. For CPUs, where the tests verify it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from inference_gateway.engine.linears import TiledLinear, replace_linears
from inference_gateway.errors import EngineIncompatible
from seqr.routing.products import ROW_TILE

NAME = "seqr_paged_invariant"
KEY_BLOCK = 64


def make_invariant(model: nn.Module) -> None:
    """Replace every Linear of ``model`` by a tiled one. Raises ``EngineIncompatible`` unless it is on a CPU."""
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise EngineIncompatible(f"deterministic serving is for CPUs only; the model is on {device}")
    replace_linears(model, TiledLinear)


def invariant_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """``attention.paged_attention`` with bits that do not depend on the batch: same arguments, same shapes.

    Takes the keyword ``sequence_lengths``: (new tokens, all tokens) of each sequence, in batch order.
    """
    if kwargs.get("softcap") is not None or hasattr(module, "sinks"):
        raise ValueError(f"the attention '{NAME}' knows neither soft-capped scores nor attention sinks")
    lengths, cache = kwargs.get("sequence_lengths"), kwargs.get("cache")
    if lengths is None or cache is None:
        raise ValueError(f"the attention '{NAME}' runs inside the continuous batch only: no lengths or cache was given")
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    heads, groups = query.shape[1], key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = torch.zeros(query.shape[2], heads, value.shape[-1], dtype=query.dtype, device=query.device)
    q_start = k_start = 0
    for new, known in lengths:
        k, v = (
            side[0, :, k_start : k_start + known].float().repeat_interleave(heads // groups, dim=0)
            for side in (key, value)
        )
        rows = query[0, :, q_start : q_start + new].float() * scale
        out[q_start : q_start + new] = one_sequence(rows, k, v).transpose(0, 1).to(out.dtype)
        q_start, k_start = q_start + new, k_start + known
    return out.unsqueeze(0), None


def one_sequence(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention of a sequence's last Q of K tokens: query [H, Q, D] scaled, key, value [H, K, D] -> [H, Q, D].

    All fp32. softmax(q k^T) v with the sums over keys taken block by block of 64, in order.
    """
    heads, new, size = query.shape
    past = key.shape[1] - new
    missing = -key.shape[1] % KEY_BLOCK
    keys = F.pad(key, (0, 0, 0, missing)).view(heads, -1, KEY_BLOCK, size).transpose(2, 3).contiguous()
    values = F.pad(value, (0, 0, 0, missing)).view(heads, -1, KEY_BLOCK, value.shape[2])
    out = []
    for start in range(0, new, ROW_TILE):
        tile = F.pad(query[:, start : start + ROW_TILE], (0, 0, 0, max(0, start + ROW_TILE - new)))
        last = past + min(start + ROW_TILE, new)
        blocks = -(-last // KEY_BLOCK)
        scores = _products(tile[:, None].expand(-1, blocks, -1, -1), keys[:, :blocks])
        position = torch.arange(past + start, past + start + ROW_TILE)
        reach = torch.arange(blocks * KEY_BLOCK).view(blocks, 1, KEY_BLOCK)
        scores.masked_fill_(reach > position[:, None], float("-inf"))
        weights = (scores - scores.amax((1, 3), keepdim=True)).exp_()
        parts, sums = _products(weights, values[:, :blocks]), weights.sum(3)
        total, norm = parts[:, 0].clone(), sums[:, 0].clone()
        for block in range(1, blocks):
            total += parts[:, block]
            norm += sums[:, block]
        out.append(total / norm[:, :, None])
    return torch.cat(out, dim=1)[:, :new]


def _products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left [H, B, 16, K] by right [H, B, K, M] -> [H, B, 16, M], each of the H B products by itself."""
    flat = torch.bmm(left.reshape(-1, *left.shape[2:]), right.reshape(-1, *right.shape[2:]))
    return flat.view(*left.shape[:3], right.shape[3])
