"""The largest permitted score, token by token, without a table of scores."""

import math

import pytest
import torch

from seqr.kernels.permission_bits import pack_bits
from seqr.kernels.route import route_tokens
from seqr.kernels.tables import SiteMismatch, SiteTables
from tests.seqr.kernels.world import DEVICE, POPULARITY, World, random_world, rows_for, tables_of


def chosen(world: World, bits: torch.Tensor, row: torch.Tensor) -> list[list[int]]:
    found, z = route_tokens(world.z[None], world.tables, bits, row)
    assert torch.equal(z[0], world.z)
    return found.choice().tolist()


@pytest.mark.parametrize("choices", POPULARITY.values(), ids=POPULARITY.keys())
def test_one_permitted_adapter_is_the_choice_and_none_is_nobody(choices: list[int]) -> None:
    world = random_world(tokens=len(choices))
    _, bits, row = rows_for([[c] if c >= 0 else [] for c in choices], world.tables)
    assert chosen(world, bits, row) == [choices] * 3


@pytest.mark.parametrize(
    ("rank", "adapters", "tokens"), [(1, 5, 3), (3, 70, 17), (8, 130, 9), (16, 64, 66), (32, 65, 5)]
)
def test_the_choice_is_the_fp64_argmax_over_the_permitted(rank: int, adapters: int, tokens: int) -> None:
    world = random_world(tokens, adapters, rank, outputs=(8, 8), seed=rank)
    g = torch.Generator().manual_seed(rank)
    sets = [torch.nonzero(torch.rand(adapters, generator=g) < 0.5).flatten().tolist() for _ in range(tokens)]
    table, bits, row = rows_for(sets, world.tables)
    choice = chosen(world, bits, row)
    for module in range(2):
        for token in range(0, tokens, 3):
            world.check_choice(module, token, table[token + 1, :adapters].tolist(), choice[module][token])


def test_ties_go_to_the_lowest_column_within_a_block_and_across_blocks_and_splits() -> None:
    world = random_world(tokens=6, adapters=200, rank=4, outputs=(8,))
    world.r[0, 5:] = world.r[0, 5]
    world.mu[0, 5:], world.sigma[0, 5:] = world.mu[0, 5], world.sigma[0, 5]
    world.tables = tables_of(world.r, world.mu, world.sigma, world.b, torch.float32)
    _, bits, row = rows_for([[7, 6, 199], [130, 70, 71], [199, 64], [63, 64], [198, 199], [5, 199]], world.tables)
    assert chosen(world, bits, row) == [[6, 70, 64, 63, 198, 5]]


@pytest.mark.parametrize(
    ("z", "weight"),
    [([1.0, 1.0], 1.0), ([1.0, 1.0], 257.0), ([257.0, 1.0], 1.0), ([257.0, 1.0], 257.0), ([1.0, 1.0], 131329.0),
     ([131329.0, 1.0], 1.0)],
)  # fmt: skip
def test_none_of_the_products_that_fp32_can_see_is_left_out(z: list[float], weight: float) -> None:
    # 257 needs two bf16 numbers and 131,329 three. Column 0's score is 0 exactly, as column 1's; any less
    # and the tie would not go to it.
    gram, offset = torch.zeros(1, 1, 3, 64), torch.full((1, 64), math.nan)
    gram[0, 0, 1, 0] = weight
    offset[0, :2] = torch.tensor([math.sqrt(z[0] * z[1] * weight), 0.0])
    tables = SiteTables.of(gram.to(DEVICE), offset.to(DEVICE), torch.zeros(2, 2, 8, device=DEVICE), (8,))
    bits = pack_bits(torch.ones(2, 64, dtype=torch.bool, device=DEVICE))
    row = torch.ones(1, dtype=torch.int32, device=DEVICE)
    found, _ = route_tokens(torch.tensor(z, device=DEVICE).view(1, 1, 2), tables, bits, row)
    assert found.choice().tolist() == [[0]] and found.value.tolist() == [[[0.0]]]


def test_a_score_that_is_not_finite_never_wins() -> None:
    world = random_world(tokens=4, adapters=6, outputs=(8,))
    world.sigma[0, 2], world.sigma[0, 4] = math.nan, 0.0
    world.r[0, 1] = 1e30
    world.tables = tables_of(world.r, world.mu, world.sigma, world.b, torch.float32)
    _, bits, row = rows_for([[1, 2, 4], [1, 2, 3, 4], [2], [4, 5]], world.tables)
    assert chosen(world, bits, row) == [[-1, 3, -1, 5]]


def test_what_a_forbidden_adapter_holds_changes_nothing() -> None:
    world = random_world(tokens=5, adapters=70, outputs=(8,))
    _, bits, row = rows_for([[0, 3, 9, 66]] * 5, world.tables)
    before = chosen(world, bits, row)
    for value in (math.nan, math.inf, 1e30):
        gram, offset = world.tables.gram.clone(), world.tables.offset.clone()
        forbidden = torch.ones(128, dtype=torch.bool)
        forbidden[[0, 3, 9, 66]] = False
        gram[:, 0][..., forbidden[:64]] = value
        gram[:, 1][..., forbidden[64:]] = value
        world.tables = SiteTables.of(gram, offset, world.tables.b_t, (8,))
        assert chosen(world, bits, row) == before


@pytest.mark.parametrize("row", [0, -1, 3, 2**20])
def test_row_0_and_rows_that_do_not_exist_permit_nobody(row: int) -> None:
    world = random_world(tokens=2, adapters=6, outputs=(8,))
    bits = pack_bits(torch.ones(3, 64, dtype=torch.bool, device=DEVICE))
    rows = torch.tensor([row, 1], dtype=torch.int32, device=DEVICE)
    choice = chosen(world, bits, rows)[0]
    assert choice[0] == -1 and choice[1] >= 0


def test_parts_of_z_are_added_before_they_are_scored() -> None:
    world = random_world(tokens=20, adapters=70, outputs=(8, 8))
    _, bits, row = rows_for([[*range(70)]] * 20, world.tables)
    halves = torch.stack([world.z * 0.5, world.z * 0.25, world.z * 0.25])
    found, z = route_tokens(halves, world.tables, bits, row)
    assert torch.equal(z[0], world.z)
    assert found.choice().tolist() == chosen(world, bits, row)


def test_packed_bits_are_the_table() -> None:
    table = torch.rand(7, 96, generator=torch.Generator().manual_seed(0)) < 0.5
    bits = pack_bits(table)
    again = (bits[:, torch.arange(96) // 32] >> (torch.arange(96) % 32)) & 1
    assert bits.dtype == torch.int32 and torch.equal(again.bool(), table)


def test_tables_that_do_not_fit_are_refused() -> None:
    tables = random_world(adapters=3).tables
    with pytest.raises(SiteMismatch):
        SiteTables.of(tables.gram, tables.offset, tables.b_t, (40, 24))
    with pytest.raises(SiteMismatch):
        SiteTables.of(tables.gram[:, :, :-1], tables.offset, tables.b_t, (40, 24, 24))
    with pytest.raises(SiteMismatch):
        SiteTables.of(tables.gram.bfloat16(), tables.offset, tables.b_t, (40, 24, 24))
