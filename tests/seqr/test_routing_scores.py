"""The score of an adapter is its calibrated activation norm, in true fp32, whatever the process has set."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqr.routing.features import feature_count, features, gram
from seqr.routing.products import COLUMN_BLOCK, ExactFp32
from seqr.routing.reference import reference_score, reference_score_error
from seqr.routing.scores import choose, scores, usable


def stacked(rs: list[torch.Tensor], mus: list[float], sigmas: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """gram [blocks, F, 64] and offset [N] as a library makes them."""
    width = -(-len(rs) // COLUMN_BLOCK) * COLUMN_BLOCK
    grams = torch.zeros(width, feature_count(rs[0].shape[0]))
    offset = torch.zeros(width)
    for i, (r, mu, sigma) in enumerate(zip(rs, mus, sigmas, strict=True)):
        grams[i], offset[i] = gram(r) / sigma**2, mu / sigma
    return grams.view(-1, COLUMN_BLOCK, grams.shape[1]).transpose(1, 2).contiguous(), offset


def random_r(rank: int, condition: float, generator: torch.Generator) -> torch.Tensor:
    """Upper triangular with singular values from 1 down to 1 / condition."""
    left, right = (torch.linalg.qr(torch.randn(rank, rank, generator=generator).double())[0] for _ in range(2))
    values = torch.logspace(0, -float(torch.log10(torch.tensor(condition))), rank).double()
    return torch.linalg.qr((left * values) @ right)[1].float()


@pytest.fixture
def coarse_fp32() -> Iterator[None]:
    """A process that has traded fp32 products for speed."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@settings(max_examples=60, deadline=None)
@given(
    rank=st.integers(1, 32),
    adapters=st.integers(1, 6),
    condition=st.sampled_from([1.0, 1e2, 1e4, 1e8]),
    seed=st.integers(0, 2**31),
)
def test_every_score_is_within_the_proven_bound_of_the_fp64_score(
    rank: int, adapters: int, condition: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rs = [random_r(rank, condition, generator) for _ in range(adapters)]
    mus = torch.rand(adapters, generator=generator).tolist()
    sigmas = (0.1 + torch.rand(adapters, generator=generator)).tolist()
    z = torch.randn(8, rank, generator=generator)
    # The cruellest tokens: those that the first adapter nearly cancels.
    z[:4] = torch.linalg.svd(rs[0].double())[2][-1].float() * torch.tensor([1e-3, 1.0, 10.0, 1e3])[:, None]
    got = scores(z, *stacked(rs, mus, sigmas))
    for t in range(8):
        for i in range(adapters):
            expected = reference_score(rs[i], mus[i], sigmas[i], z[t])
            error = reference_score_error(rs[i], mus[i], sigmas[i], z[t])
            assert abs(float(got[t, i]) - expected) <= error


def test_features_and_gram_are_the_two_sides_of_the_quadratic_form() -> None:
    r, z = torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([[5.0, 7.0]])
    assert features(z).tolist() == [[25.0, 35.0, 49.0]]
    assert gram(r).tolist() == [1.0, 4.0, 13.0]
    assert float(features(z).double() @ gram(r)) == 19.0**2 + 21.0**2


def test_a_norm_that_cancels_to_less_than_nothing_is_zero_and_not_nan() -> None:
    r = torch.tensor([[1.0, 1.0], [0.0, 1e-9]])
    z = torch.tensor([[1.0 + 2**-12, -1.0 - 2**-12], [3.0, -3.0]]).repeat(20, 1) * torch.rand(40, 1)
    assert bool(torch.isfinite(scores(z, *stacked([r], [0.0], [1.0]))).all())


@pytest.mark.parametrize("tokens", [1, 16, 33])
def test_a_process_that_chose_coarse_products_does_not_get_coarse_routes(coarse_fp32: None, tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    gram_blocks, offset = stacked([random_r(16, 10.0, generator) for _ in range(3)], [0.0] * 3, [1.0] * 3)
    z = torch.randn(tokens, 16, generator=generator)
    with ExactFp32("cpu"):
        guarded = scores(z, gram_blocks, offset)
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    torch.set_float32_matmul_precision("highest")
    assert torch.equal(guarded, scores(z, gram_blocks, offset))


def test_autocast_does_not_reach_the_scores_and_is_back_afterwards() -> None:
    generator = torch.Generator().manual_seed(0)
    gram_blocks, offset = stacked([random_r(8, 10.0, generator) for _ in range(3)], [0.0] * 3, [1.0] * 3)
    z = torch.randn(5, 8, generator=generator)
    plain = scores(z, gram_blocks, offset)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not torch.equal(plain, scores(z, gram_blocks, offset).float())
        with ExactFp32("cpu"):
            assert torch.equal(plain, scores(z, gram_blocks, offset))
        assert torch.is_autocast_enabled("cpu")


def test_usable_is_true_for_numbers_only() -> None:
    assert usable(torch.tensor([0.0, -7.0, 1e30, float("nan"), float("inf")])).tolist() == [
        True,
        True,
        True,
        False,
        False,
    ]


def test_choose_takes_the_lowest_of_equals() -> None:
    value = torch.tensor([1.0, 3.0, 3.0, 3.0]).repeat(3, 40)
    allowed = torch.zeros(3, 160, dtype=torch.bool)
    allowed[0, 2:] = True
    allowed[1, [0, 130, 131]] = True
    allowed[2, [0, 4, 8]] = True
    assert choose(value, allowed).tolist() == [2, 130, 0]


def test_choose_takes_nobody_from_nothing() -> None:
    assert choose(torch.full((2, 64), 9.0), torch.zeros(2, 64, dtype=torch.bool)).tolist() == [-1, -1]
