"""The per-token choice is the fp64 argmax on every token, however close two adapters are."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqr.bench.routing.adapters import Shelf
from seqr.bench.routing.adversary import assorted, cancelled, crossings, oracle, triangular, twins
from seqr.library import Library, PermissionRows
from seqr.routing import exact
from seqr.routing.per_token import Gate, route, route_activations
from seqr.routing.reference import oracle_score, reference_score
from seqr.routing.scores import scores
from seqr.step import Segment, StepContext
from tests.seqr.exact_cases import plain_oracle
from tests.seqr.strategies import broken, toy_adapter, toy_library, toy_plan

pytestmark = pytest.mark.usefixtures("either_way")
CONDITIONS = [1.0, 1e2, 1e4, 1e8]


def choices(hard: Shelf, z: torch.Tensor, permitted: torch.Tensor) -> list[int]:
    return route_activations(z, hard.columns, Gate(permitted), hard.truth).tolist()


def everything(hard: Shelf, tokens: int) -> torch.Tensor:
    permitted = torch.zeros(tokens, hard.columns.offset.shape[0], dtype=torch.bool)
    permitted[:, : hard.r.shape[0]] = True
    return permitted


@settings(max_examples=40, deadline=None)
@given(
    rank=st.integers(1, 16),
    count=st.integers(1, 70),
    condition=st.sampled_from(CONDITIONS),
    seed=st.integers(0, 2**20),
)
def test_random_tokens_get_the_oracles_choice(rank: int, count: int, condition: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hard = assorted(rank, count, condition, generator)
    z = torch.randn(20, rank, generator=generator)
    permitted = everything(hard, 20) & (torch.rand(20, hard.columns.offset.shape[0], generator=generator) < 0.8)
    assert choices(hard, z, permitted) == plain_oracle(hard, z, permitted)


@pytest.mark.parametrize("gap", [1e-5, 1e-6, 1e-7, 0.0])
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("rank", [1, 8, 32])
def test_adapters_that_differ_by_a_millionth_and_less_are_told_apart(rank: int, condition: float, gap: float) -> None:
    generator = torch.Generator().manual_seed(rank)
    hard = twins(rank, 5, gap, condition, generator)
    z = torch.randn(60, rank, generator=generator)
    permitted = everything(hard, 60)
    assert choices(hard, z, permitted) == plain_oracle(hard, z, permitted)


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("rank", [2, 8, 16])
def test_tokens_on_the_border_of_two_adapters_get_the_oracles_choice(rank: int, condition: float) -> None:
    generator = torch.Generator().manual_seed(rank)
    hard = assorted(rank, 2, condition, generator)
    z = crossings(hard, 300, generator)
    permitted = everything(hard, 300)
    expected = plain_oracle(hard, z, permitted)
    plain = route(scores(z, hard.columns.gram, hard.columns.offset), permitted).tolist()
    assert choices(hard, z, permitted) == expected
    # The tokens are hard enough: fp32 alone gets some of them wrong.
    assert plain != expected


@pytest.mark.parametrize("condition", CONDITIONS)
def test_tokens_that_an_adapter_nearly_cancels_get_the_oracles_choice(condition: float) -> None:
    generator = torch.Generator().manual_seed(3)
    hard = assorted(8, 6, condition, generator)
    z = cancelled(hard, 60, generator)
    permitted = everything(hard, 60)
    assert choices(hard, z, permitted) == plain_oracle(hard, z, permitted)


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e-6, 1e6, 1e15])
def test_tiny_and_huge_activations_get_the_oracles_choice(scale: float) -> None:
    generator = torch.Generator().manual_seed(4)
    r = torch.stack([triangular(8, 100.0, generator) for _ in range(7)])
    hard = Shelf.of(r, torch.zeros(7, dtype=torch.float64), torch.ones(7, dtype=torch.float64))
    z = torch.randn(50, 8, generator=generator) * scale
    permitted = everything(hard, 50)
    assert choices(hard, z, permitted) == plain_oracle(hard, z, permitted)


@settings(max_examples=60, deadline=None)
@given(
    rank=st.integers(1, 32),
    condition=st.sampled_from(CONDITIONS),
    mu=st.sampled_from([0.0, 0.3, 1.0, 1e3, -2.0]),
    sigma=st.sampled_from([1e-6, 0.1, 1.0, 1e6]),
    seed=st.integers(0, 2**20),
)
def test_the_rounding_bound_is_never_violated(rank: int, condition: float, mu: float, sigma: float, seed: int) -> None:
    """The true score, in exact fractions, lies between lo and hi of every fp32 score (``seqr.routing.exact``)."""
    generator = torch.Generator().manual_seed(seed)
    r = triangular(rank, condition, generator)[None]
    hard = Shelf.of(r, torch.tensor([mu], dtype=torch.float64), torch.tensor([sigma], dtype=torch.float64))
    z = torch.randn(12, rank, generator=generator)
    z[:6] = torch.linalg.svd(r[0].double())[2][-1].float() * torch.logspace(-20, 6, 6)[:, None]
    score = scores(z, hard.columns.gram, hard.columns.offset)[:, 0].tolist()
    slope, floor = float(hard.truth.slope[0]), float(hard.truth.floor[0])
    for token, value in zip(z.tolist(), score, strict=True):
        squared = (
            sum(
                (sum((Fraction(a) * Fraction(b) for a, b in zip(row, token, strict=True)), Fraction()) ** 2)
                for row in r[0].tolist()
            )
            / Fraction(sigma) ** 2
        )
        offset = mu / sigma
        rounding = 3.1 * exact.UNIT * (abs(value) + abs(offset))
        d = slope * sum(x * x for x in token) + floor
        low = max(max(value + offset - rounding, 0.0) ** 2 - d, 0.0)
        high = max(value + offset + rounding, 0.0) ** 2 + d
        assert low * (1 - 1e-12) <= squared <= high * (1 + 1e-12)


@settings(max_examples=30, deadline=None)
@given(rank=st.integers(1, 16), condition=st.sampled_from(CONDITIONS), seed=st.integers(0, 2**20))
def test_a_token_that_is_not_in_doubt_has_one_candidate(rank: int, condition: float, seed: int) -> None:
    """The quick comparison is never surer than the bound of every single adapter."""
    generator = torch.Generator().manual_seed(seed)
    hard = assorted(rank, 9, condition, generator)
    z = torch.randn(200, rank, generator=generator) * torch.logspace(-3, 3, 200)[:, None]
    permitted = everything(hard, 200)
    score = scores(z, hard.columns.gram, hard.columns.offset)
    best, second = score.masked_fill(~permitted, -math.inf).topk(2).values.unbind(1)
    sure = ~exact.doubtful(z, best, second, hard.truth)
    for t in sure.nonzero()[0].tolist():
        token, column = torch.zeros(9, dtype=torch.int64), torch.arange(9)
        low, high = exact.interval(z[t : t + 1], score[t, :9], token, column, hard.truth)
        assert int((high >= low.max()).sum()) == 1


def test_nearly_all_ordinary_tokens_are_sure_at_once() -> None:
    generator = torch.Generator().manual_seed(5)
    hard = assorted(8, 64, 100.0, generator)
    z = torch.randn(4000, 8, generator=generator)
    score = scores(z, hard.columns.gram, hard.columns.offset)
    best, second = score.topk(2).values.unbind(1)
    assert exact.doubtful(z, best, second, hard.truth).mean() < 0.01


@pytest.mark.parametrize("condition", CONDITIONS)
def test_the_oracle_of_the_benchmark_is_the_plain_one(condition: float) -> None:
    generator = torch.Generator().manual_seed(11)
    for hard in (assorted(8, 5, condition, generator), twins(8, 5, 1e-7, condition, generator)):
        z = torch.cat([torch.randn(40, 8, generator=generator), crossings(hard, 40, generator)])
        permitted = everything(hard, 80) & (torch.rand(80, 64, generator=generator) < 0.7)
        assert oracle(hard, z, permitted)[0].tolist() == plain_oracle(hard, z, permitted)


def test_true_scores_have_the_bits_of_the_oracle() -> None:
    generator = torch.Generator().manual_seed(6)
    hard = assorted(16, 5, 1e8, generator)
    z = torch.randn(40, 16, generator=generator)
    columns = torch.randint(5, (40,), generator=generator)
    got = exact.true_scores(z, columns, hard.truth)
    for value, token, i in zip(got.tolist(), z, columns.tolist(), strict=True):
        mu, sigma = float(hard.mu[i]), float(hard.sigma[i])
        assert value == oracle_score(hard.r[i].tolist(), mu, sigma, token.tolist())
        assert value == pytest.approx(reference_score(hard.r[i], mu, sigma, token), rel=1e-9, abs=1e-9)


def test_equal_adapters_tie_and_the_lowest_permitted_column_wins() -> None:
    generator = torch.Generator().manual_seed(7)
    hard = twins(8, 70, 0.0, 10.0, generator)
    permitted = everything(hard, 30)
    permitted[10:, :3] = False
    permitted[20:, :66] = False
    assert choices(hard, torch.randn(30, 8, generator=generator), permitted) == [0] * 10 + [3] * 10 + [66] * 10


@pytest.mark.parametrize("part", ["r", "mu", "sigma"])
def test_a_nan_adapter_is_never_chosen_and_moves_nobody(part: str) -> None:
    generator = torch.Generator().manual_seed(8)
    plain = twins(8, 4, 1e-7, 10.0, generator)
    parts = {"r": plain.r.clone(), "mu": plain.mu.clone(), "sigma": plain.sigma.clone()}
    parts[part][2] = math.nan
    sick = Shelf.of(**parts)
    z = torch.randn(50, 8, generator=generator)
    permitted = everything(plain, 50)
    without = permitted.clone()
    without[:, 2] = False
    assert choices(sick, z, permitted) == choices(plain, z, without) == plain_oracle(plain, z, without)
    only = torch.zeros_like(permitted)
    only[:, 2] = True
    assert choices(sick, z, only) == [-1] * 50


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_a_forbidden_adapter_moves_no_choice_however_large_it_is(size: float) -> None:
    """It is in the library-wide constants of the quick comparison: they decide who is looked at twice, no more."""
    generator = torch.Generator().manual_seed(9)
    hard = twins(8, 4, 1e-7, 10.0, generator)
    z = torch.randn(80, 8, generator=generator)
    permitted = everything(hard, 80)
    permitted[:, 1] = False
    r, mu = hard.r.clone(), hard.mu.clone()
    r[1], mu[1] = triangular(8, 1e8, generator) * size, -size
    assert choices(Shelf.of(r, mu, hard.sigma), z, permitted) == choices(hard, z, permitted)


def test_a_forbidden_adapter_that_overflows_moves_no_choice() -> None:
    generator = torch.Generator().manual_seed(10)
    hard = assorted(8, 4, 10.0, generator)
    z = torch.randn(40, 8, generator=generator) * 1e6
    permitted = everything(hard, 40)
    permitted[:, 1] = False
    r = hard.r.clone()
    r[1] *= 1e16
    huge = Shelf.of(r, hard.mu, hard.sigma)
    assert bool(scores(z, huge.columns.gram, huge.columns.offset)[:, 1].isinf().any())
    for truth in (True, False):
        got = [route_activations(z, one.columns, Gate(permitted), one.truth if truth else None) for one in (huge, hard)]
        assert torch.equal(*got)


@settings(max_examples=30, deadline=None)
@given(tokens=st.sampled_from([1, 15, 16, 17, 600]), count=st.integers(1, 130), seed=st.integers(0, 2**20))
def test_without_the_truth_the_choice_is_that_of_the_plain_scores(tokens: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hard = assorted(4, count, 1e8, generator)
    z = torch.randn(tokens, 4, generator=generator)
    z[::7] = math.nan
    z[3::11] *= 1e30
    permitted = everything(hard, tokens) & (torch.rand(tokens, 1, generator=generator) < 0.9)
    permitted &= torch.rand(permitted.shape, generator=generator) < 0.5
    expected = route(scores(z, hard.columns.gram, hard.columns.offset), permitted)
    assert torch.equal(route_activations(z, hard.columns, Gate(permitted)), expected)


@pytest.mark.parametrize("is_exact", [True, False])
def test_a_library_of_nobody_and_a_permitted_set_of_nobody_choose_nobody(is_exact: bool) -> None:
    plan = toy_plan()
    z = torch.randn(5, plan.rank)
    for library, permitted in ((Library.empty(plan), ["a"]), (toy_library(plan, ["a"]), [])):
        rows = PermissionRows(library)
        segments = [Segment(rows.row_for(permitted), 0, 5, mode="per_token")]
        assert StepContext(rows, segments, exact=is_exact).choose(0, z).tolist() == [-1] * 5


def test_a_step_routes_exactly_by_default_and_the_library_holds_what_it_needs() -> None:
    plan = toy_plan()
    library = toy_library(plan, ["a"])
    adapter = toy_adapter(plan, seed=sum(b"a") * 7919)
    near = {}
    for name, module in adapter.modules.items():
        near[name] = type(module)(module.q, module.r * (1.0 + 2.0**-22), module.mu, module.sigma)
    library = library.add("b", 1, type(adapter)(near)).add("c", 1, broken(adapter, "r"))
    rows = PermissionRows(library)
    z = torch.randn(64, plan.rank, generator=torch.Generator().manual_seed(1))
    step = StepContext(rows, [Segment(rows.row_for("abc"), 0, 64, mode="per_token")])
    assert step.choose(0, z).tolist() == [1] * 64
    part = adapter.modules["first"]
    truth = library.stacks[0].truth
    assert torch.equal(truth.r[0], part.r)
    assert (float(truth.mu[0]), float(truth.sigma[0])) == (part.mu, part.sigma)


@pytest.mark.parametrize("tokens", [1, 16, 33])
@pytest.mark.parametrize("is_exact", [True, False])
def test_a_batch_of_one_user_is_routed_as_the_same_tokens_among_others(tokens: int, is_exact: bool) -> None:
    """One permission for all tokens is laid out once, not token by token: the same choices."""
    generator = torch.Generator().manual_seed(12)
    hard = assorted(8, 70, 1e4, generator)
    z = torch.randn(tokens + 1, 8, generator=generator)
    z[0] *= 1e25
    permitted = everything(hard, tokens + 1)
    permitted[:, ::3] = False
    permitted[tokens] = False
    truth = hard.truth if is_exact else None
    mixed, alone = Gate(permitted), Gate(permitted[:tokens])
    assert (mixed.uniform, alone.uniform) == (False, True)
    together = route_activations(z, hard.columns, mixed, truth)
    assert torch.equal(together[:tokens], route_activations(z[:tokens], hard.columns, alone, truth))
    assert int(together[tokens]) == -1
