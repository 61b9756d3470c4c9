"""Attention over the paged cache: every sequence reads its own past and its own new tokens, in any mixture of them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from inference_gateway.engine.attention import paged_attention, split_batch

HEADS, GROUPS, SIZE = 4, 2, 8


class Pages:
    """A cache that scatters tokens over its pages and gives back those that it is asked for, in that order."""

    def __init__(self, lengths: list[tuple[int, int]], past: list[torch.Tensor]):
        total = sum(known for _, known in lengths)
        self.stored = torch.full((2, 3 * total, GROUPS, SIZE), float("nan"))
        place = torch.randperm(3 * total)[:total]
        self.read, self.write = place, []
        start = 0
        for (new, known), (keys, values) in zip(lengths, past, strict=True):
            mine = place[start : start + known]
            self.stored[0, mine[: known - new]], self.stored[1, mine[: known - new]] = keys, values
            self.write.append(mine[known - new :])
            start += known

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, kwargs: Any) -> Any:
        written = torch.cat(self.write)
        self.stored[0, written] = key_states[0].transpose(0, 1)
        self.stored[1, written] = value_states[0].transpose(0, 1)
        (index,) = kwargs["read_index"]
        return tuple(side[index].transpose(0, 1).unsqueeze(0) for side in self.stored)


@pytest.mark.parametrize(
    "lengths",
    [
        [(1, 5), (1, 9), (1, 2)],  # only next tokens
        [(4, 4), (3, 3)],  # only prompts
        [(1, 7), (4, 4), (1, 3), (5, 12), (1, 30)],  # both, and a prompt's later chunk
        [(1, 1), (1, 4)],  # a prompt of one token
        [(2, 6)],
    ],
)
def test_each_sequence_attends_to_itself_alone(lengths: list[tuple[int, int]]) -> None:
    torch.manual_seed(1)
    tokens = sum(new for new, _ in lengths)
    past = [torch.randn(2, known - new, GROUPS, SIZE) for new, known in lengths]
    query = torch.randn(1, HEADS, tokens, SIZE)
    key, value = torch.randn(2, 1, GROUPS, tokens, SIZE)
    cache = Pages(lengths, past)
    split = split_batch([new for new, _ in lengths], [known for _, known in lengths], query.device)
    read = cache.read if split.order is None else cache.read[split.order]
    layer = nn.Module()
    layer.layer_idx = 0  # type: ignore[assignment]
    got, _ = paged_attention(
        layer, query, key, value, None, scaling=0.3, batch_split=split, cache=cache, read_index=[read]
    )
    start = 0
    for (new, known), (old_keys, old_values) in zip(lengths, past, strict=True):
        mine = slice(start, start + new)
        k = torch.cat([old_keys, key[0, :, mine].transpose(0, 1)]).repeat_interleave(HEADS // GROUPS, dim=1)
        v = torch.cat([old_values, value[0, :, mine].transpose(0, 1)]).repeat_interleave(HEADS // GROUPS, dim=1)
        scores = 0.3 * torch.einsum("hqd,khd->hqk", query[0, :, mine], k)
        future = torch.arange(known) > torch.arange(known - new, known)[:, None]
        wanted = torch.einsum("hqk,khd->qhd", F.softmax(scores.masked_fill(future, float("-inf")), -1), v)
        torch.testing.assert_close(got[0, mine], wanted)
        start += new
