"""Attention over the paged cache in which every sequence reads its own keys and values and nothing else.

The engine's own sdpa path attends over the keys of the *whole batch* under a mask. A masked weight is exactly zero, but
0 x NaN is NaN: one user's overflow would reach every other user of the batch. Here sequences never meet, and the work
grows with the sum of the lengths instead of batch size times that sum.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

NAME = "seqr_paged"


@dataclass(frozen=True)
class Span:
    """One sequence that brings more than its next token: its slice of the flat queries and of the keys as read."""

    q_start: int
    q_end: int
    k_start: int
    k_end: int
    mask: torch.Tensor | None  # [q, k] bool, None when the sequence has no past


@dataclass(frozen=True)
class BatchSplit:
    """How one flat batch splits into sequences; made once per step and read by every layer.

    ``singles`` [S] are the flat positions of sequences with a past and one new token; ``single_mask`` [S, 1, 1, K]
    says which of the K keys that each of them reads are its own and not padding. ``order`` [S * K + the spans' keys]:
    the keys to read, as places in the order of the batch: first K for every single, padded with its *own* last key,
    then the spans'. None without singles: the order of the batch.
    """

    spans: tuple[Span, ...]
    singles: torch.Tensor | None
    single_mask: torch.Tensor | None
    order: torch.Tensor | None


def split_batch(query_lengths: Sequence[int], key_lengths: Sequence[int], device: torch.device) -> BatchSplit:
    """Split a flat batch; lengths are per sequence, in batch order, and a key length includes the new tokens."""
    singles: list[tuple[int, int, int]] = []
    longer: list[tuple[int, int, int, int]] = []
    q_start = k_start = 0
    for q_len, k_len in zip(query_lengths, key_lengths, strict=True):
        if q_len == 1 < k_len:
            singles.append((q_start, k_start, k_len))
        elif q_len:
            longer.append((q_start, q_len, k_start, k_len))
        q_start += q_len
        k_start += k_len
    longest = max((k_len for *_, k_len in singles), default=0)
    read, spans = len(singles) * longest, []
    for q_start, q_len, _, k_len in longer:
        mask = None
        if k_len > q_len:
            mask = torch.ones(q_len, k_len, dtype=torch.bool, device=device).tril(k_len - q_len)
        spans.append(Span(q_start, q_start + q_len, read, read + k_len, mask))
        read += k_len
    if not singles:
        return BatchSplit(tuple(spans), None, None, None)
    flat, starts, lengths = (torch.tensor(column, device=device) for column in zip(*singles, strict=True))
    reach = torch.arange(longest, device=device)
    keys = starts[:, None] + torch.minimum(reach[None, :], lengths[:, None] - 1)
    mask = (reach[None, :] < lengths[:, None])[:, None, None, :]
    rest = [torch.arange(k_start, k_start + k_len, device=device) for _, _, k_start, k_len in longer]
    return BatchSplit(tuple(spans), flat, mask, torch.cat([keys.flatten(), *rest]))


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention per sequence; query [1, H, T, D], new keys and values [1, G, T, D], result [1, T, H, D].

    The cache must read in the order of the split.
    """
    if kwargs.get("softcap") is not None or hasattr(module, "sinks"):
        raise ValueError(f"the attention '{NAME}' knows neither soft-capped scores nor attention sinks")
    split: BatchSplit | None = kwargs.get("batch_split")
    cache = kwargs.get("cache")
    if split is None or cache is None:
        raise ValueError(f"the attention '{NAME}' runs inside the continuous batch only: no split or cache was given")
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    heads, groups = query.shape[1], key.shape[1]
    queries = query[0].transpose(0, 1)
    out = torch.zeros(queries.shape[0], heads, value.shape[-1], dtype=query.dtype, device=query.device)
    if split.singles is not None and split.single_mask is not None:
        rows, longest = split.single_mask.shape[0], split.single_mask.shape[-1]
        picked = queries.index_select(0, split.singles).view(rows, groups, heads // groups, -1)
        k, v = (
            side[0, :, : rows * longest].transpose(0, 1).view(rows, longest, groups, side.shape[-1]).transpose(1, 2)
            for side in (key, value)
        )
        answer = functional.scaled_dot_product_attention(picked, k, v, attn_mask=split.single_mask, scale=scaling)
        out.index_copy_(0, split.singles, answer.reshape(rows, heads, -1))
    for span in split.spans:
        k, v = (
            side[:, :, span.k_start : span.k_end].repeat_interleave(heads // groups, dim=1) for side in (key, value)
        )
        answer = functional.scaled_dot_product_attention(
            query[:, :, span.q_start : span.q_end],
            k,
            v,
            attn_mask=span.mask,
            is_causal=span.mask is None,
            scale=scaling,
        )
        out[span.q_start : span.q_end] = answer[0].transpose(0, 1)
    return out.unsqueeze(0), None
