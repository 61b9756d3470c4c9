"""Per-token routing takes the norm-maximising permitted adapter, on every token."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqr.library import PermissionRows
from seqr.routing.per_token import route
from seqr.routing.reference import reference_choice, reference_score, reference_score_error
from seqr.step import Segment, StepContext
from tests.seqr.strategies import broken, toy_adapter, toy_library, toy_plan

NAN, INF = float("nan"), float("inf")


def wide(rows: list[list[float]]) -> torch.Tensor:
    return torch.nn.functional.pad(torch.tensor(rows), (0, 64 - len(rows[0])))


def allow(rows: list[list[int]], tokens: int = 1) -> torch.Tensor:
    permitted = torch.zeros(len(rows), 64, dtype=torch.bool)
    for t, columns in enumerate(rows):
        permitted[t, columns] = True
    return permitted


@settings(max_examples=200, deadline=None)
@given(data=st.data(), tokens=st.integers(1, 6), adapters=st.integers(1, 5))
def test_the_route_is_the_reference_choice_on_any_scores(data: st.DataObject, tokens: int, adapters: int) -> None:
    some = st.sampled_from([-6.0, -1.0, 0.0, 0.5, 0.5, 2.0, 40.0, NAN, INF])
    table = data.draw(st.lists(st.lists(some, min_size=adapters, max_size=adapters), min_size=tokens, max_size=tokens))
    sets = data.draw(st.lists(st.lists(st.integers(0, adapters - 1)), min_size=tokens, max_size=tokens))
    expected = [
        reference_choice(row, [i in columns for i in range(adapters)]) for row, columns in zip(table, sets, strict=True)
    ]
    assert route(wide(table), allow(sets)).tolist() == expected


def test_a_forbidden_adapter_never_wins_however_large_its_score() -> None:
    assert route(wide([[1.0, 1e30, 2.0]]), allow([[0, 2]])).tolist() == [2]


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e38])
def test_what_a_forbidden_adapter_holds_changes_nothing(value: float) -> None:
    assert route(wide([[1.0, value, 2.0]]), allow([[0, 2]])).tolist() == [2]
    assert route(wide([[1.0, value, 1.0]]), allow([[0, 2]])).tolist() == [0]


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_permitted_score_that_is_not_a_number_never_wins(value: float) -> None:
    assert route(wide([[value, -5.0]]), allow([[0, 1]])).tolist() == [1]
    assert route(wide([[value, value]]), allow([[0, 1]])).tolist() == [-1]


def test_ties_go_to_the_lowest_silo_id() -> None:
    plan = toy_plan()
    adapter = toy_adapter(plan, seed=5)
    library = toy_library(plan, ["zz"])
    for silo in ("m", "Z", "é", "a"):
        library = library.add(silo, 1, adapter)
    rows = PermissionRows(library)
    z = torch.randn(9, plan.rank, generator=torch.Generator().manual_seed(0))
    for permitted, winner in ((["m", "Z", "é", "a"], "Z"), (["m", "é", "a"], "a"), (["é", "m"], "m")):
        step = StepContext(rows, [Segment(rows.row_for(permitted), 0, 9, mode="per_token")])
        assert step.choose(0, z).tolist() == [library.silos.index(winner)] * 9


def test_the_empty_set_gets_nobody() -> None:
    rows = PermissionRows(toy_library(toy_plan(), ["a", "b"]))
    step = StepContext(rows, [Segment(rows.row_for([]), 0, 4, mode="per_token")], tokens=6)
    assert step.choose(0, torch.randn(6, 4)).tolist() == [-1] * 6


def test_a_silo_that_is_permitted_but_not_present_is_simply_not_there() -> None:
    library = toy_library(toy_plan(), ["a"])
    rows = PermissionRows(library)
    here = StepContext(rows, [Segment(rows.row_for(["a", "gone"]), 0, 3, mode="per_token")])
    gone = StepContext(rows, [Segment(rows.row_for(["gone"]), 0, 3, mode="per_token")])
    z = torch.randn(3, 4)
    assert here.choose(0, z).tolist() == [0] * 3
    assert gone.choose(0, z).tolist() == [-1] * 3


@pytest.mark.parametrize("part", ["q", "r", "mu", "sigma"])
def test_an_adapter_with_a_nan_is_never_chosen_even_when_permitted(part: str) -> None:
    plan = toy_plan()
    library = toy_library(plan, ["a"]).add("b", 1, broken(toy_adapter(plan, 2), part))
    rows = PermissionRows(library)
    both = StepContext(rows, [Segment(rows.row_for(["a", "b"]), 0, 5, mode="per_token")])
    only = StepContext(rows, [Segment(rows.row_for(["b"]), 0, 5, mode="per_token")])
    z = torch.randn(5, 4)
    assert both.choose(0, z).tolist() == [0] * 5
    assert only.choose(0, z).tolist() == [-1] * 5


@pytest.mark.parametrize("sigma", [0.0, -1.0, INF])
def test_an_adapter_whose_deviation_means_nothing_is_never_chosen(sigma: float) -> None:
    plan = toy_plan()
    rows = PermissionRows(toy_library(plan, []).add("b", 1, broken(toy_adapter(plan, 2), "sigma", sigma)))
    step = StepContext(rows, [Segment(rows.row_for(["b"]), 0, 5, mode="per_token")])
    assert step.choose(0, torch.randn(5, 4)).tolist() == [-1] * 5


@settings(max_examples=40, deadline=None)
@given(
    rank=st.integers(1, 32),
    adapters=st.integers(1, 7),
    condition=st.sampled_from([2.0, 1e3, 1e8]),
    seed=st.integers(0, 2**20),
)
def test_routes_equal_the_fp64_reference_wherever_fp32_can_tell(
    rank: int, adapters: int, condition: float, seed: int
) -> None:
    """Two scores closer than the fp32 bound (``reference_score_error``) may be taken for each other; no others may."""
    plan = toy_plan([("only", 40, 48)], rank=rank)
    silos = [f"silo-{i}" for i in range(adapters)]
    library = toy_library(plan, [], condition)
    parts = {}
    for i, silo in enumerate(silos):
        adapter = toy_adapter(plan, seed + i, condition)
        parts[silo] = adapter.modules["only"]
        library = library.add(silo, 1, adapter)
    rows = PermissionRows(library)
    permitted = silos[seed % adapters :]
    z = torch.randn(12, rank, generator=torch.Generator().manual_seed(seed)) / rank
    step = StepContext(rows, [Segment(rows.row_for(permitted), 0, 12, mode="per_token")])
    told = 0
    for token, choice in zip(z, step.choose(0, z).tolist(), strict=True):
        score, error = [], []
        for part in parts.values():
            score.append(reference_score(part.r, part.mu, part.sigma, token))
            error.append(reference_score_error(part.r, part.mu, part.sigma, token))
        best = reference_choice(score, [silo in permitted for silo in silos])
        if choice != best:
            assert silos[choice] in permitted
            assert score[best] - score[choice] <= error[best] + error[choice]
        told += choice == best
    assert told >= 11


def test_an_activation_that_overflows_chooses_nobody_rather_than_anybody() -> None:
    rows = PermissionRows(toy_library(toy_plan(), ["a", "b"]))
    step = StepContext(rows, [Segment(rows.row_for(["a", "b"]), 0, 3, mode="per_token")])
    z = torch.ones(3, 4) * torch.tensor([1.0, 1e30, math.nan])[:, None]
    assert [choice >= 0 for choice in step.choose(0, z).tolist()] == [True, False, False]
