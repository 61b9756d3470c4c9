"""z = A x: as accurate as fp32, and the same bits whoever else is in the batch."""

import pytest
import torch

from seqr.kernels.project import Projection, add_parts, part_length, project, split_bf16
from seqr.kernels.stacked import stack_weight, stacked_product
from tests.seqr.kernels.world import DEVICE


def some(
    tokens: int, inputs: int, columns: int, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, inputs, generator=g).to(dtype).to(DEVICE),
        (torch.randn(columns, inputs, generator=g) / 16).to(DEVICE),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("tokens", "inputs", "columns"), [(1, 64, 3), (17, 200, 24), (70, 130, 48), (65, 2112, 16)])
def test_z_is_the_fp64_product_within_fp32_rounding(tokens: int, inputs: int, columns: int, dtype: torch.dtype) -> None:
    x, a = some(tokens, inputs, columns, dtype)
    expected, size = x.double() @ a.double().T, x.double().abs() @ a.double().abs().T
    for parts in (True, False):
        z = project(x, Projection.of(a), parts).double().sum(0)
        assert bool(((z - expected).abs() <= (3 * inputs + 32) * 2.0**-23 * size).all())
        # Far below what a bf16 A or a bf16 z would give, which is 2^-9.
        assert float((z - expected).norm() / expected.norm()) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_parts_added_in_order_and_the_whole_have_the_same_bits(dtype: torch.dtype) -> None:
    x, a = some(9, 300, 16, dtype)
    parts, total = project(x, Projection.of(a), True), project(x, Projection.of(a), False)[0]
    assert parts.shape[0] == -(-300 // part_length(300)) > 1
    added = parts[0]
    for part in parts[1:]:
        added = added + part
    assert torch.equal(added, total)
    assert torch.equal(add_parts(parts), total[None])


def test_a_tokens_z_does_not_depend_on_the_others() -> None:
    # At the same place in its tile: the interpreter's matmul is a BLAS, whose bits depend on a row's place.
    x, a = some(70, 200, 24, torch.bfloat16)
    whole = project(x, Projection.of(a), False)
    others = x.clone()
    others[::2] = torch.nan
    assert torch.equal(project(others, Projection.of(a), False)[0, 1::2], whole[0, 1::2])
    for end in (1, 17, 64):
        assert torch.equal(project(x[:end], Projection.of(a), False)[0], whole[0, :end])


def test_three_bf16_terms_are_all_of_fp32() -> None:
    a = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * torch.logspace(-20, 20, 1000)
    assert torch.equal(split_bf16(a).double().sum(0), a.double())


def test_a_stacked_under_w_gives_y_and_z() -> None:
    x, a = some(11, 96, 12, torch.bfloat16)
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16).to(DEVICE)
    y, z = stacked_product(x, stack_weight(weight, a), 12)
    assert z.shape == (3, 11, 12) and y.shape == (11, 40)
    torch.testing.assert_close(y.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-4)
    expected = x.double() @ a.double().T
    assert float((z.double().sum(0) - expected).norm() / expected.norm()) < 2e-6
