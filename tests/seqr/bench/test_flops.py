"""Counted operations are those that the products do, and the paper's example comes out."""

import pytest

from seqr.bench.paper.flops import METHODS, flops, measured


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 1, 3, 5), (7, 4, 24, 40), (50, 8, 64, 64)])
def test_the_profiler_sees_what_is_counted(method: str, shape: tuple[int, int, int, int]) -> None:
    assert flops(method, *shape, k=3) == measured(method, *shape, k=3)


def test_the_papers_table_counts_a_multiply_add_as_one() -> None:
    shape = (1000, 8, 4096, 4096)
    assert [flops(m, *shape) // 2 for m in ("naive", "spectr", "lag", "arrow", "seqr")] == [
        65_536_000, 32_768_000, 4_751_360, 4_096_000, 64_000,
    ]  # fmt: skip


def test_features_halve_the_papers_count() -> None:
    assert flops("ours", 1000, 8, 4096, 4096) == 72_000
