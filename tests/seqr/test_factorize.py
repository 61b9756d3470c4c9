"""s B = Q R: what leaves the silo is the trained B, in one form only."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqr.factorize import FactorizationRefused, factorize

SHAPES = [(1, 1), (16, 16), (64, 4), (192, 16), (1536, 32)]


def random_b(m: int, rank: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, rank, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("m", "rank"), SHAPES)
def test_the_factors_are_the_scaled_b_again(m: int, rank: int) -> None:
    b = random_b(m, rank)
    q, r = factorize(b, 2.0)
    assert q.dtype == r.dtype == torch.float32
    torch.testing.assert_close(
        q.double() @ r.double(), 2.0 * b.double(), rtol=0, atol=2e-6 * float(b.abs().max()) * rank
    )


@pytest.mark.parametrize(("m", "rank"), SHAPES)
def test_q_is_orthonormal_and_r_is_upper_triangular_with_a_positive_diagonal(m: int, rank: int) -> None:
    q, r = factorize(random_b(m, rank), 0.5)
    torch.testing.assert_close(q.double().T @ q.double(), torch.eye(rank).double(), rtol=0, atol=1e-6)
    assert torch.equal(r, r.triu())
    assert bool((r.diagonal() > 0).all())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), rank=st.integers(1, 32), scale=st.sampled_from([0.125, 1.0, 2.0, 16.0]))
def test_the_norm_of_r_z_is_the_norm_of_the_adapters_output(seed: int, rank: int, scale: float) -> None:
    """Theorem 3.3 of the paper."""
    b, z = random_b(48, rank, seed), random_b(rank, 1, seed + 1)
    _, r = factorize(b, scale)
    expected = (scale * b.double() @ z.double()).norm()
    torch.testing.assert_close((r.double() @ z.double()).norm(), expected, rtol=1e-5, atol=1e-6 * float(expected))


def test_the_factors_are_unique_whatever_the_sign_of_b() -> None:
    q, r = factorize(random_b(64, 8), 1.0)
    minus_q, minus_r = factorize(-random_b(64, 8), 1.0)
    assert torch.equal(r, minus_r)
    assert torch.equal(q, -minus_q)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_b_gives_the_same_bytes_with_any_number_of_threads(threads: int) -> None:
    b = random_b(1536, 32)
    q, r = factorize(b, 2.0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(3):
            again_q, again_r = factorize(b.clone(), 2.0)
            assert torch.equal(q, again_q)
            assert torch.equal(r, again_r)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rank_of_b", [0, 1, 3])
def test_a_b_that_lacks_rank_still_gets_orthonormal_q_and_repeatable_bytes(rank_of_b: int) -> None:
    b = random_b(64, rank_of_b) @ random_b(rank_of_b, 4, 1) if rank_of_b else torch.zeros(64, 4)
    q, r = factorize(b, 1.0)
    torch.testing.assert_close(q.double().T @ q.double(), torch.eye(4).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(q @ r, b, rtol=0, atol=1e-5)
    assert bool((r.diagonal() >= 0).all())
    assert int((r.diagonal().abs() > 1e-5).sum()) == rank_of_b
    assert all(torch.equal(*pair) for pair in zip((q, r), factorize(b.clone(), 1.0), strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_training_is_refused_by_name(value: float) -> None:
    b = random_b(8, 2)
    b[3, 1] = value
    with pytest.raises(FactorizationRefused, match="diverged") as refusal:
        factorize(b, 1.0)
    assert refusal.value.code == "factorization_refused"


def test_a_b_wider_than_it_is_tall_is_refused_with_its_shape() -> None:
    with pytest.raises(FactorizationRefused, match=r"\(3, 4\)"):
        factorize(torch.zeros(3, 4), 1.0)
