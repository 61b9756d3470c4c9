"""y[t] += z[t] B_i^T, rounded once, and not at all where there is nobody."""

import pytest
import torch

from seqr.kernels.candidates import Candidates
from seqr.kernels.expand import expand_groups, expand_tokens
from seqr.kernels.group import group
from tests.seqr.kernels.world import DEVICE, POPULARITY, World, random_world

FORMS = ["by token", "by group"]


@pytest.fixture(autouse=True)
def narrow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a program has several of them to do, and the last one is not full."""
    monkeypatch.setattr("seqr.kernels.expand.GROUP_COLUMNS", 16)


def reference(world: World, y: torch.Tensor, choices: list[list[int]]) -> torch.Tensor:
    out, start = y.double().cpu(), 0
    for module, width in enumerate(world.tables.outputs):
        for token, i in enumerate(choices[module]):
            if i >= 0:
                b = world.tables.b_t[i, :, start : start + width].double().cpu()
                out[token, start : start + width] += world.own_z(module, token).double() @ b
        start += width
    return out


def expand(world: World, y: torch.Tensor, choices: list[list[int]], form: str) -> None:
    choice = torch.tensor(choices, dtype=torch.int32, device=DEVICE)
    if form == "by group":
        expand_groups(y, world.z[None], world.tables, group(choice, world.tables.adapters, 16))
    else:
        column = choice[:, :, None]
        record = torch.full_like(choice, -7)
        expand_tokens(y, world.z[None], world.tables, Candidates(column, column), record=record)
        assert torch.equal(record, choice)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("choices", POPULARITY.values(), ids=POPULARITY.keys())
def test_the_share_of_the_chosen_is_added_whatever_their_popularity(choices: list[int], form: str) -> None:
    world = random_world(tokens=len(choices), outputs=(40, 24), dtype=torch.bfloat16)
    per_module = [choices, choices[1:] + choices[:1]]
    y = torch.randn(len(choices), 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).to(DEVICE)
    before, expected = y.clone(), reference(world, y, per_module)
    expand(world, y, per_module, form)
    torch.testing.assert_close(y.double().cpu(), expected, rtol=2.0**-8, atol=1e-5)
    start = 0
    for module, width in enumerate(world.tables.outputs):
        nobody = torch.tensor(per_module[module]) < 0
        own = slice(start, start + width)
        assert torch.equal(y[nobody, own].view(torch.int16), before[nobody, own].view(torch.int16))
        start += width


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rank", "dtype"), [(1, torch.bfloat16), (3, torch.float16), (16, torch.bfloat16), (32, torch.float32)]
)
def test_one_rounding_for_every_rank_and_dtype(rank: int, dtype: torch.dtype, weights: torch.dtype, form: str) -> None:
    world = random_world(tokens=18, rank=rank, outputs=(300, 24), dtype=weights)
    choices = [[t % 5 - 1 for t in range(18)], [t % 2 for t in range(18)]]
    y = torch.randn(18, 324, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)
    exact = reference(world, y, choices)
    expand(world, y, choices, form)
    slack = 1e-5 * exact.abs().clamp_min(1.0)
    rounded = [(exact + sign * slack).to(dtype).double() for sign in (-1, 1)]
    got = y.double().cpu()
    assert bool(((got >= rounded[0]) & (got <= rounded[1])).all())


def test_the_sum_may_come_from_an_fp32_product_and_z_in_parts() -> None:
    world = random_world(tokens=9, dtype=torch.bfloat16)
    choices = [[-1, 3, 4, -1, 0, 3, 2, 1, 0], [2] * 9, [-1] * 9]
    source = torch.randn(9, 100, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    expected = reference(world, source[:, :88], choices)
    y = torch.full((9, 88), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    column = torch.tensor(choices, dtype=torch.int32, device=DEVICE)[:, :, None]
    parts = torch.stack([world.z * 0.5, world.z * 0.25, world.z * 0.25])
    expand_tokens(y, parts, world.tables, Candidates(column, column), source=source)
    torch.testing.assert_close(y.double().cpu(), expected, rtol=2.0**-8, atol=1e-5)


def test_the_best_of_the_candidates_is_taken_and_ties_go_to_the_lowest() -> None:
    world = random_world(tokens=4, outputs=(24,))
    value = torch.tensor([[[1.0, 3.0, 2.0], [5.0, 5.0, 5.0], [-torch.inf] * 3, [-torch.inf, -torch.inf, -9.0]]])
    column = torch.tensor([[[0, 4, 8], [1, 5, 9], [-1, -1, -1], [-1, -1, 7]]], dtype=torch.int32)
    candidates = Candidates(value.to(DEVICE), column.to(DEVICE))
    assert candidates.choice().tolist() == [[4, 1, -1, 7]]
    y = torch.zeros(4, 24, device=DEVICE)
    expand_tokens(y, world.z[None], world.tables, candidates)
    expected = reference(world, torch.zeros(4, 24), [[4, 1, -1, 7]])
    torch.testing.assert_close(y.double().cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_z_of_a_token_with_nobody_may_be_anything(form: str) -> None:
    world = random_world(tokens=3, outputs=(24,))
    world.z[1] = torch.nan
    y = torch.ones(3, 24, device=DEVICE)
    expand(world, y, [[2, -1, 2]], form)
    assert bool(torch.isfinite(y).all()) and bool((y[1] == 1.0).all())
