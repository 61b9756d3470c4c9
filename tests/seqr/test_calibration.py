"""mu and sigma in one pass are the mean and deviation of everything that passed."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqr.calibration import RunningMoments, norms
from seqr.factorize import factorize


def moments_of(parts: list[torch.Tensor]) -> RunningMoments:
    moments = RunningMoments()
    for part in parts:
        moments.update(part)
    return moments


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any),
    seed=st.integers(0, 2**31),
    shift=st.sampled_from([0.0, 1e3, 1e8]),
)
def test_any_split_of_the_stream_gives_the_moments_of_the_whole(lengths: list[int], seed: int, shift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(length, generator=generator, dtype=torch.float64) + shift for length in lengths]
    whole = torch.cat(parts).numpy()
    moments = moments_of(parts)
    assert moments.count == len(whole)
    assert moments.mean == pytest.approx(float(np.mean(whole)), rel=1e-12, abs=1e-12)
    assert moments.std == pytest.approx(float(np.std(whole)), rel=1e-6, abs=1e-7)


def test_merging_two_streams_is_one_stream() -> None:
    values = torch.randn(100, generator=torch.Generator().manual_seed(0))
    left, right = moments_of([values[:37]]), moments_of([values[37:]])
    left.merge(right)
    assert left.mean == pytest.approx(moments_of([values]).mean)
    assert left.std == pytest.approx(moments_of([values]).std)


def test_a_small_deviation_around_a_large_mean_survives() -> None:
    values = torch.tensor([1e9 + delta for delta in (0.0, 1.0, 2.0, 3.0)], dtype=torch.float64)
    assert moments_of([values[:1], values[1:]]).std == pytest.approx(math.sqrt(1.25))


def test_no_numbers_have_no_deviation() -> None:
    empty = moments_of([torch.empty(0)])
    assert (empty.count, empty.mean, empty.std) == (0, 0.0, 0.0)
    empty.merge(RunningMoments())
    assert empty.count == 0


def test_norms_are_the_norms_of_what_the_adapter_adds() -> None:
    generator = torch.Generator().manual_seed(0)
    b, a, x = (torch.randn(*shape, generator=generator) for shape in ((48, 8), (8, 32), (20, 32)))
    _, r = factorize(b, 4.0)
    expected = torch.linalg.vector_norm(4.0 * x.double() @ a.double().T @ b.double().T, dim=1)
    torch.testing.assert_close(norms(r, (x.double() @ a.double().T).float()), expected, rtol=1e-5, atol=0)
