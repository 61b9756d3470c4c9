"""Tokens by adapter, on the device."""

import pytest
import torch

from seqr.kernels.group import group
from tests.seqr.kernels.world import DEVICE, POPULARITY


def as_device(choices: list[list[int]]) -> torch.Tensor:
    return torch.tensor(choices, dtype=torch.int32, device=DEVICE)


def check(choices: list[list[int]], adapters: int, tile: int) -> None:
    groups, tokens = group(as_device(choices), adapters, tile), len(choices[0])
    for module, chosen in enumerate(choices):
        used = int(groups.used[module])
        got: dict[int, list[int]] = {}
        for block in range(used):
            rows = groups.token[module, block * tile : (block + 1) * tile].tolist()
            members = [token for token in rows if token < tokens]
            assert members and rows == members + [tokens] * (tile - len(members))
            got.setdefault(int(groups.adapter[module, block]), []).extend(members)
        expected: dict[int, list[int]] = {}
        for token, adapter in enumerate(chosen):
            expected.setdefault(adapter, []).append(token)
        expected.pop(-1, None)
        assert got == expected and list(got) == sorted(expected)
        assert used == sum(-(-len(members) // tile) for members in expected.values())
        assert groups.token[module, used * tile :].eq(tokens).all() and groups.adapter[module, used:].eq(-1).all()


@pytest.mark.parametrize("tile", [16, 64])
@pytest.mark.parametrize("choices", POPULARITY.values(), ids=POPULARITY.keys())
def test_every_token_with_an_adapter_is_in_its_group_once_in_order(choices: list[int], tile: int) -> None:
    check([choices, choices[::-1], [5] * len(choices)], 12, tile)


@pytest.mark.parametrize("adapters", [1, 64, 700])
@pytest.mark.parametrize("tokens", [128, 129, 400])
def test_across_chunks_of_tokens_and_blocks_of_adapters(tokens: int, adapters: int) -> None:
    g = torch.Generator().manual_seed(tokens + adapters)
    check([torch.randint(-1, adapters, (tokens,), generator=g).tolist()], adapters, 16)


def test_the_same_choice_for_all_modules_need_not_be_copied() -> None:
    settled = as_device([[3, -1, 3, 0]])
    groups = group(settled.expand(3, -1), 4, 16)
    assert groups.used.tolist() == [2, 2, 2] and groups.token[2, :17].tolist() == [3, *[4] * 15, 0]
