"""What a GPU does with few adapters, all of them at once, is what is done with the chosen ones one by one."""

import pytest
import torch

from seqr.routers.interface import Activation, Batch, Mixture
from seqr.routers.mixture_model import add_every, add_mixture
from seqr.routers.norms import r_factors
from seqr.routers.pool import AdapterPool, LoraFactors
from seqr.routers.seqr import SeqrRouter, choose_in_fp64
from seqr.routers.statistics import Statistics

N, R, IN, OUT, T = 5, 4, 12, 9, 40


def a_pool(shared: bool) -> AdapterPool:
    dice = torch.Generator().manual_seed(3)
    a = torch.randn(N, R, IN, generator=dice)
    b = torch.randn(N, OUT, R, generator=dice)
    return AdapterPool({str(i): {"m": LoraFactors(a[0 if shared else i], b[i])} for i in range(N)})


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("k", [1, 3])
def test_one_product_over_all_adapters_adds_what_the_chosen_ones_add(shared: bool, k: int) -> None:
    dice = torch.Generator().manual_seed(4)
    pool, y = a_pool(shared), torch.randn(T, OUT, generator=dice)
    columns = torch.stack([torch.randperm(N, generator=dice)[:k] for _ in range(T)])
    columns[::7] = -1
    mixture = Mixture(columns, torch.rand(T, k, generator=dice))
    activation = Activation(pool, 0, torch.randn(T, IN, generator=dice))
    got = add_every(y, activation, mixture)
    torch.testing.assert_close(got, add_mixture(y, activation, mixture))
    assert torch.equal(got[::7], y[::7])
    assert add_every(y.bfloat16(), activation, mixture).dtype == torch.bfloat16


def test_fp64_for_every_adapter_chooses_what_the_router_chooses() -> None:
    dice = torch.Generator().manual_seed(5)
    pool = a_pool(True)
    sigma = torch.rand(1, N, generator=dice, dtype=torch.float64) + 0.5
    sigma[0, 2] = 0.0  # never chosen
    statistics = Statistics(torch.rand(1, N, generator=dice, dtype=torch.float64), sigma)
    permitted = torch.rand(4, N, generator=dice) < 0.7
    permitted[1] = False
    batch, _ = Batch.of([[1] * 10, [1] * 10, [1] * 7, [1] * 10], N, 0, permitted=permitted)
    router = SeqrRouter(pool, statistics)
    router.begin(batch)
    activation = Activation(pool, 0, torch.randn(T, IN, generator=dice))
    allowed = batch.allowed & (sigma[0] > 0)
    got = choose_in_fp64(activation.z, r_factors(pool, 0), statistics.mu[0], sigma[0].clamp_min(1e-9), allowed)
    with torch.inference_mode():
        assert torch.equal(got, router.route(activation).columns[:, 0])
    assert (got[10:20] == -1).all() and (got != 2).all() and len(set(got.tolist())) > 3


def test_a_pool_is_moved_whole_and_says_whether_it_is_finite() -> None:
    pool = a_pool(False)
    r_factors(pool, 0)
    moved = pool.to("meta")
    assert moved.names == pool.names and moved.a[0].device.type == moved.b_t[0].device.type == "meta"
    assert not moved.kept_r and pool.kept_r and pool.finite
    broken = a_pool(False)
    broken.b_t[0][1, 0, 0] = torch.inf
    assert not broken.finite
