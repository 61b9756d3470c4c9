"""Search among very many adapters finds what scoring every one of them finds, on every token."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqr.bench.routing.adapters import Shelf, random_shelf
from seqr.bench.routing.adversary import assorted, cancelled, crossings, twins
from seqr.routing.search import LEAF, SearchIndex
from tests.seqr.exact_cases import plain_oracle

pytestmark = pytest.mark.usefixtures("either_way")


def index_of(shelf: Shelf, generator: torch.Generator) -> SearchIndex:
    return SearchIndex.build(shelf.truth, shelf.usable, torch.randn(200, shelf.r.shape[1], generator=generator))


def found(shelf: Shelf, z: torch.Tensor, permitted: torch.Tensor, generator: torch.Generator) -> list[int]:
    index = index_of(shelf, generator)
    return index.route(z, index.allow(permitted)).tolist()


@settings(max_examples=25, deadline=None)
@given(
    rank=st.integers(1, 12),
    count=st.integers(1, 90),
    condition=st.sampled_from([1.0, 1e2, 1e8]),
    seed=st.integers(0, 2**20),
)
def test_search_finds_the_oracles_choice(rank: int, count: int, condition: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shelf = assorted(rank, count, condition, generator)
    z = torch.randn(12, rank, generator=generator)
    permitted = shelf.everyone(12) & (torch.rand(12, shelf.usable.shape[0], generator=generator) < 0.7)
    assert found(shelf, z, permitted, generator) == plain_oracle(shelf, z, permitted)


@pytest.mark.parametrize("gap", [1e-6, 1e-8, 0.0])
def test_search_tells_near_twins_apart_and_gives_ties_to_the_lowest_column(gap: float) -> None:
    generator = torch.Generator().manual_seed(1)
    shelf = twins(8, 30, gap, 100.0, generator)
    z = torch.cat([torch.randn(20, 8, generator=generator), cancelled(shelf, 20, generator)])
    permitted = shelf.everyone(40)
    permitted[20:, :5] = False
    assert found(shelf, z, permitted, generator) == plain_oracle(shelf, z, permitted)


def test_search_decides_tokens_on_the_border_of_two_adapters() -> None:
    generator = torch.Generator().manual_seed(2)
    shelf = assorted(8, 2, 1e4, generator)
    z = crossings(shelf, 100, generator)
    permitted = shelf.everyone(100)
    assert found(shelf, z, permitted, generator) == plain_oracle(shelf, z, permitted)


@settings(max_examples=25, deadline=None)
@given(rank=st.integers(1, 12), scale=st.sampled_from([1e-3, 1.0, 1e3]), seed=st.integers(0, 2**20))
def test_no_member_of_a_leaf_ever_scores_above_the_leafs_bound(rank: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shelf = random_shelf(50, rank, seed)
    index = index_of(shelf, generator)
    z = torch.randn(30, rank, generator=generator) * scale
    norms = torch.einsum("nij,tj->tni", shelf.r.double(), z.double()).norm(dim=2)
    score = (norms - shelf.mu) / shelf.sigma
    assert bool((score[:, index.column].amax(2) <= index.bounds(z)).all())


def test_every_usable_adapter_is_in_a_leaf_and_no_other() -> None:
    shelf = random_shelf(LEAF * 5 + 3, 4)
    sick = Shelf.of(shelf.r, shelf.mu, shelf.sigma.clone().index_fill_(0, torch.tensor([7]), math.nan))
    index = index_of(sick, torch.Generator().manual_seed(3))
    assert sorted(set(index.column.flatten().tolist())) == [i for i in range(LEAF * 5 + 3) if i != 7]


def test_a_forbidden_adapter_moves_no_choice_and_nobody_permitted_is_nobody_chosen() -> None:
    generator = torch.Generator().manual_seed(4)
    shelf = assorted(8, 20, 100.0, generator)
    z = torch.randn(30, 8, generator=generator)
    permitted = shelf.everyone(30)
    permitted[:, 3] = False
    permitted[25:] = False
    r = shelf.r.clone()
    r[3] *= 1e6
    loud = Shelf.of(r, shelf.mu, shelf.sigma)
    choice = found(loud, z, permitted, generator)
    assert choice == found(shelf, z, permitted, generator) == plain_oracle(shelf, z, permitted)
    assert choice[25:] == [-1] * 5


def test_a_token_that_is_no_number_gets_nobody() -> None:
    shelf = random_shelf(20, 4)
    z = torch.tensor([[math.nan] * 4, [1e30] * 4, [1.0] * 4])
    assert [c >= 0 for c in found(shelf, z, shelf.everyone(3), torch.Generator().manual_seed(5))] == [
        False,
        False,
        True,
    ]


def test_an_empty_library_chooses_nobody() -> None:
    empty = torch.zeros(0, dtype=torch.float64)
    shelf = Shelf.of(torch.zeros(0, 4, 4), empty, empty)
    assert found(shelf, torch.ones(3, 4), shelf.everyone(3), torch.Generator().manual_seed(6)) == [-1] * 3
