"""What routing one token in one Linear costs, counted (SEQR paper, table 1 and figure 5).

Only the score of every adapter is counted, as in the paper: 2 operations per multiply-add of each matrix product.
Norms, comparisons and A x, which the adapter needs anyway where A is shared, are left out, except where the paper's
complexity has them. ``measured`` counts the same products with torch's profiler of operations.
"""

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

LAG_K = 20
METHODS = ("naive", "spectr", "lag", "arrow", "seqr", "ours")
NAMES = {"seqr": "SEQR as published: R z", "ours": "SEQR here: vech features"}


def flops(method: str, adapters: int, rank: int, n: int, m: int, k: int = LAG_K) -> int:
    """Operations per token: N adapters of rank r between n and m dimensions."""
    kept = min(k, adapters)
    return {
        "naive": 2 * adapters * rank * (n + m),
        "spectr": 2 * adapters * rank * n,
        "lag": 2 * adapters * n + 2 * kept * rank * n,
        "arrow": 2 * adapters * n,
        "seqr": 2 * adapters * rank * rank,
        "ours": adapters * rank * (rank + 1),
    }[method]


def stored(method: str, adapters: int, rank: int, n: int, m: int) -> int:
    """fp32 bytes that routing reads per token and module; the shared A, read by all, is left out."""
    numbers = {
        "naive": adapters * rank * (n + m),
        "spectr": adapters * rank * n,
        "lag": adapters * n + adapters * rank * n,
        "arrow": adapters * n,
        "seqr": adapters * rank * rank,
        "ours": adapters * rank * (rank + 1) // 2,
    }[method]
    return 4 * numbers


def measured(method: str, adapters: int, rank: int, n: int, m: int, k: int = LAG_K) -> int:
    """Operations per token that torch's ``FlopCounterMode`` sees in the method's products, of tensors without data."""

    def of(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, device="meta")

    x, z = of(1, n), of(1, rank)
    kept = min(k, adapters)
    products: dict[str, Callable[[], object]] = {
        "naive": lambda: (
            torch.mm(of(adapters * rank, n), x.T),
            torch.bmm(of(adapters, m, rank), of(adapters, rank, 1)),
        ),
        "spectr": lambda: torch.mm(of(adapters * rank, n), x.T),
        "lag": lambda: (torch.mm(of(adapters, n), x.T), torch.mm(of(kept * rank, n), x.T)),
        "arrow": lambda: torch.mm(of(adapters, n), x.T),
        "seqr": lambda: torch.mm(of(adapters * rank, rank), z.T),
        "ours": lambda: torch.mm(of(1, rank * (rank + 1) // 2), of(rank * (rank + 1) // 2, adapters)),
    }
    with FlopCounterMode(display=False) as counter:
        products[method]()
    return int(counter.get_total_flops())


def paper_table() -> list[dict[str, int | str]]:
    """The paper's table 1: N = 1,000, n = m = 4,096, r = 8, k = 20, counted and seen by the profiler."""
    shape = (1000, 8, 4096, 4096)
    return [
        {"method": method, "flops": flops(method, *shape), "profiled": measured(method, *shape),
         "bytes": stored(method, *shape)}
        for method in METHODS
    ]  # fmt: skip
