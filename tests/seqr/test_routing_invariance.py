"""A token's route depends on the token and on the adapters it may use: not on its neighbours, not to the last bit.

These tests hold bit equality for the BLAS of this machine; a gateway looks whether it holds where it runs.
"""

from collections.abc import Iterator
from functools import partial

import pytest
import torch

from seqr.routing.features import feature_count
from seqr.routing.products import COLUMN_BLOCK, ROW_TILE, project, score_product, unsteady

ROWS = [*range(1, 66), 96, 100, 127, 128, 129, 200, 255, 256, 257, 300, 511, 512, 513, 600, 1025]
RANKS = [1, 2, 4, 8, 16, 32, 64]


@pytest.fixture(params=[1, 2, 4])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int32)


@pytest.mark.parametrize("rank", RANKS)
def test_an_adapters_scores_do_not_depend_on_its_column_or_on_the_other_adapters(threads: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    column = torch.randn(feature_count(rank), generator=generator)
    for tokens in (1, 2, 3, 15, 16, 17, 64, 513):
        features = torch.randn(tokens, feature_count(rank), generator=generator)
        alone = torch.zeros(1, feature_count(rank), COLUMN_BLOCK)
        alone[0, :, 0] = column
        expected = bits(score_product(features, alone)[:, 0])
        for blocks, place in [(1, place) for place in range(0, 64, 7)] + [(2, 63), (2, 64), (5, 300)]:
            crowd = torch.randn(blocks, feature_count(rank), COLUMN_BLOCK, generator=generator)
            crowd[(place + 1) // COLUMN_BLOCK % blocks, 0, (place + 1) % COLUMN_BLOCK] = float("nan")
            crowd[place // COLUMN_BLOCK, :, place % COLUMN_BLOCK] = column
            assert torch.equal(bits(score_product(features, crowd)[:, place]), expected), (tokens, blocks, place)


@pytest.mark.parametrize("rank", RANKS)
def test_a_tokens_scores_do_not_depend_on_the_batch(threads: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    features = torch.randn(max(ROWS) + 40, feature_count(rank), generator=generator)
    blocks = torch.randn(1, feature_count(rank), COLUMN_BLOCK, generator=generator)
    expected = bits(score_product(features, blocks))
    for tokens in ROWS:
        for start in (0, tokens % 37):
            window = slice(start, start + tokens)
            assert torch.equal(bits(score_product(features[window], blocks)), expected[window]), (tokens, start)


@pytest.mark.parametrize(
    ("n", "rank"), [(24, 1), (64, 4), (576, 8), (576, 16), (576, 48), (960, 16), (1536, 16), (4096, 8), (4096, 32)]
)
def test_a_tokens_z_does_not_depend_on_the_batch(threads: int, n: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(max(ROWS) + 40, n, generator=generator)
    a_t = torch.randn(n, rank, generator=generator)
    expected = bits(project(x, a_t))
    for tokens in ROWS if n < 4096 else ROWS[::6]:
        start = tokens % 37
        z = project(x[start : start + tokens], a_t)
        assert z.shape[0] % ROW_TILE == 0
        assert torch.equal(bits(z[:tokens]), expected[start : start + tokens]), tokens
        assert not bool(z[tokens:].any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_z_of_any_dtype_is_the_fp32_product_of_the_widened_x(dtype: torch.dtype) -> None:
    x = torch.randn(19, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    a_t = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(bits(project(x, a_t)), bits(project(x.float(), a_t)))
    torch.testing.assert_close(project(x, a_t)[:19].double(), x.double() @ a_t.double(), rtol=1e-5, atol=1e-5)


def test_z_of_a_transposed_x_is_z_of_its_copy() -> None:
    x = torch.randn(24, 32, generator=torch.Generator().manual_seed(0)).T
    a_t = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(bits(project(x, a_t)), bits(project(x.contiguous(), a_t)))


def test_a_machine_whose_products_depend_on_their_company_is_found_out(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = [torch.randn(576, 16), torch.randn(16, 576)]
    assert unsteady(weights, 136) is None
    real = torch.bmm

    def bmm_that_minds(narrowest: int, left: torch.Tensor, right: torch.Tensor, **out: torch.Tensor) -> torch.Tensor:
        product = real(left, right, **out)
        return product.mul_(1 + 2**-22) if left.shape[0] < 8 and right.shape[2] >= narrowest else product

    for narrowest, found in (
        (1, "a product of 16 rows by 576 x 16"),
        (65, "a product of 16 rows by 16 x 576"),
        (64, "a product of 16 rows of 136 features by 1 x 64 adapters"),
    ):
        monkeypatch.setattr(torch, "bmm", partial(bmm_that_minds, narrowest))
        assert unsteady(weights if narrowest != 64 else [], 136) == found


def test_a_machine_whose_scores_depend_on_the_number_of_tokens_is_found_out_where_that_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = torch.bmm

    def bmm_that_minds(left: torch.Tensor, right: torch.Tensor, **out: torch.Tensor) -> torch.Tensor:
        return real(left, right, **out) * (1 + 2**-22 if left.shape[1] < 64 else 1)

    assert unsteady([], 136, any_batch=True) is None
    monkeypatch.setattr(torch, "bmm", bmm_that_minds)
    assert unsteady([], 136) is None
    assert unsteady([], 136, any_batch=True) == "a product of 16 rows of 136 features"
