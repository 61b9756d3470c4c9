import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch

from seqr.shared_a import SharedAMismatch, digest_a, draw_a, inverse_normal, verify_a


def test_the_same_seed_and_module_give_the_same_bits_for_ever():
    a = draw_a(7, "model.layers.0.self_attn.q_proj", 4, 64)
    assert a.shape == (4, 64) and a.dtype == torch.float32
    assert digest_a(a) == "108122d0afd2a12af4b63a5caadb05e14bbef2b83c043f109ee78e6697c69505"


def test_seed_and_module_name_both_matter():
    digests = {digest_a(draw_a(seed, name, 4, 8)) for seed in (0, 1, 2**63 - 1) for name in ("a", "b", "aa")}
    assert len(digests) == 9


def test_entries_are_normal_with_variance_one_over_rank_squared():
    a = draw_a(3, "module", 8, 50_000).double().flatten().numpy() * 8
    ordered = np.sort(a)
    expected = (np.arange(len(a)) + 0.5) / len(a)
    cumulative = np.vectorize(statistics.NormalDist().cdf)(ordered[::40])
    assert abs(cumulative - expected[::40]).max() < 1.63 / len(a) ** 0.5  # Kolmogorov-Smirnov, 1%


def test_quantiles_agree_with_the_standard_library_from_the_centre_to_the_far_tails():
    p = np.concatenate(
        [np.linspace(1e-6, 1 - 1e-6, 20_001), 2.0 ** -np.arange(2.0, 54.0), 1 - 2.0 ** -np.arange(2.0, 52.0)]
    )
    normal = statistics.NormalDist()
    expected = np.array([normal.inv_cdf(float(value)) for value in p])
    np.testing.assert_allclose(inverse_normal(p), expected, rtol=2e-15, atol=1e-16)


def test_a_is_drawn_for_every_module_of_the_plan(tiny_plan):
    drawn = verify_a(tiny_plan)
    assert list(drawn) == [module.name for module in tiny_plan.modules]
    assert all(drawn[m.name].shape == (tiny_plan.rank, m.in_features) for m in tiny_plan.modules)


def test_modules_in_another_order_draw_the_same_a(small_plan):
    reversed_plan = replace(small_plan, modules=tuple(reversed(small_plan.modules)))
    assert all(torch.equal(a, verify_a(small_plan)[name]) for name, a in verify_a(reversed_plan).items())


def test_a_machine_that_draws_another_a_refuses_and_names_the_module(small_plan):
    digests = dict(small_plan.a_digests) | {"layers.0.v": "0" * 64}
    with pytest.raises(SharedAMismatch, match=r"module layers\.0\.v has digest"):
        verify_a(replace(small_plan, a_digests=digests))
    with pytest.raises(SharedAMismatch, match=r"layers\.0\.q"):
        verify_a(replace(small_plan, seed=small_plan.seed + 1))
