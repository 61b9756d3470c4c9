"""The choice alone, x [T, n] to one of N adapters: ours, and every method it is compared with, in true fp32."""

import time
from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu.adapters import blocks_of, random_r
from benchmarks.gpu.timing import captured, interleaved
from seqr.kernels.permission_bits import pack_bits
from seqr.kernels.project import Projection, project
from seqr.kernels.route import route_tokens
from seqr.kernels.tables import SiteTables
from seqr.routing.products import ExactFp32

LAG_KEPT = 20
_MOST_BYTES = 24e9
_MOST_FLOPS = 4e12
METHODS = ("ours", "stacked", "arrow", "lag", "spectr", "naive")


def flops(method: str, n_adapters: int, rank: int, inputs: int, tokens: int) -> float:
    """Multiplications and additions counted from the products alone."""
    z = 2.0 * inputs * rank
    per_token = {
        "ours": z + n_adapters * rank * (rank + 1),
        "stacked": z + 2.0 * n_adapters * rank * rank,
        "arrow": 2.0 * n_adapters * inputs,
        "lag": 2.0 * n_adapters * inputs + 2.0 * min(LAG_KEPT, n_adapters) * rank * inputs,
        "spectr": 2.0 * n_adapters * rank * inputs,
        "naive": z + 2.0 * n_adapters * rank * inputs,
    }
    return tokens * per_token[method]


def weight_bytes(method: str, n_adapters: int, rank: int, inputs: int) -> float:
    """What a method must hold to choose, in fp32."""
    return (
        4.0
        * {
            "ours": n_adapters * rank * (rank + 1) / 2 + rank * inputs,
            "stacked": n_adapters * rank * rank + rank * inputs,
            "arrow": n_adapters * inputs,
            "lag": n_adapters * inputs * (1 + rank),
            "spectr": n_adapters * inputs * rank,
            "naive": n_adapters * inputs * rank + rank * inputs,
        }[method]
    )


def cell(n_adapters: int, rank: int, inputs: int, tokens: int, device: torch.device, rounds: int) -> dict[str, float]:
    """Median milliseconds per method; a method that would need too much memory or arithmetic is left out."""
    fits = [
        m for m in METHODS
        if weight_bytes(m, n_adapters, rank, inputs) * (2 if m == "lag" else 1) < _MOST_BYTES
        and flops(m, n_adapters, rank, inputs, tokens) < _MOST_FLOPS
        and 4.0 * tokens * n_adapters * (rank if m in ("spectr", "stacked") else 1) < _MOST_BYTES
    ]  # fmt: skip
    runs = {name: captured(run, device) for name, run in _methods(n_adapters, rank, inputs, tokens, fits, device)}
    return interleaved(runs, device, rounds)


def _methods(
    n_adapters: int, rank: int, inputs: int, tokens: int, fits: list[str], device: torch.device
) -> Iterator[tuple[str, Callable[[], object]]]:
    x = torch.randn(tokens, inputs, dtype=torch.bfloat16, device=device)
    a = torch.randn(rank, inputs, device=device) / inputs**0.5
    r = random_r(1, n_adapters, rank, device)
    mask = torch.ones(tokens, n_adapters, dtype=torch.bool, device=device)
    low = torch.tensor(-torch.inf, device=device)
    # One random tensor for all who keep r x n numbers per adapter, as all methods are alive at once.
    spectrum = x.new_empty(0, rank, inputs, dtype=torch.float32)
    if {"lag", "spectr", "naive"} & set(fits):
        spectrum = torch.empty(n_adapters, rank, inputs, device=device).normal_()
    for method in fits:
        score = _ours(x, a, r) if method == "ours" else _peer(method, x, a, r, spectrum)

        def exactly(score: Callable[[], torch.Tensor] = score, ours: bool = method == "ours") -> object:
            with ExactFp32(device.type), torch.inference_mode():
                return score() if ours else torch.where(mask, score(), low).argmax(1)

        yield method, exactly


def _ours(x: torch.Tensor, a: torch.Tensor, r: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The choice, not a score."""
    adapters, rank = r.shape[1:3]
    width = 64 * -(-adapters // 64)
    gram, offset, _ = blocks_of(r, width)
    tables = SiteTables.of(gram, offset, torch.zeros(1, rank, 64, device=x.device), (64,))
    bits = pack_bits(torch.ones(2, width, dtype=torch.bool, device=x.device))
    row, weight = torch.ones(x.shape[0], dtype=torch.int32, device=x.device), Projection.of(a)

    def choice() -> torch.Tensor:
        return route_tokens(project(x, weight), tables, bits, row)[0].choice()

    return choice


def _peer(
    method: str, x: torch.Tensor, a: torch.Tensor, r: torch.Tensor, spectrum: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """score [T, N]. ARROW's, SPECTR's, LAG's and naive's weights are random: their time does not depend on them."""
    adapters, rank, inputs = r.shape[1], r.shape[2], x.shape[1]
    if method == "stacked":
        stacked = r[0].reshape(adapters * rank, rank)
        return lambda: _norms((x.float() @ a.T) @ stacked.T, adapters)
    if method == "naive":
        return lambda: _naive(x.float() @ a.T, spectrum.view(adapters, inputs, rank))
    if method == "spectr":
        return lambda: _norms(x.float() @ spectrum.view(-1, inputs).T, adapters)
    arrow = torch.empty(adapters, inputs, device=x.device).normal_()
    if method == "arrow":
        return lambda: torch.abs(x.float() @ arrow.T)
    return lambda: _lag(x.float(), arrow, spectrum)


def _norms(hidden: torch.Tensor, n_adapters: int) -> torch.Tensor:
    return hidden.view(hidden.shape[0], n_adapters, -1).square().sum(2).sqrt()


def _lag(x: torch.Tensor, arrow: torch.Tensor, spectrum: torch.Tensor) -> torch.Tensor:
    """SPECTR's norm for the k best by ARROW, -inf for the others."""
    score = x @ arrow.T
    kept = score.abs().topk(min(LAG_KEPT, arrow.shape[0]), dim=1).indices
    norms = [
        torch.einsum("tn,tkrn->tkr", x[at : at + 32], spectrum[kept[at : at + 32]]).square().sum(2).sqrt()
        for at in range(0, x.shape[0], 32)
    ]
    return score.fill_(-torch.inf).scatter_(1, kept, torch.cat(norms))


def _naive(z: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """||B_i z|| by forming B_i z, as many adapters at a time as fit in a gigabyte."""
    step = max(1, int(2.5e8 / (z.shape[0] * b.shape[1])))
    return torch.cat([torch.einsum("tr,nmr->tnm", z, part).square().sum(2) for part in b.split(step)], dim=1)


def grid(
    device: torch.device, interpret: bool, until: float
) -> Iterator[tuple[tuple[int, int, int, int], dict[str, float]]]:
    """Cells (N, r, n, T) until the clock says ``until``, those of the bars first."""
    if interpret:
        cells = [(5, 4, 64, 1), (70, 4, 64, 3)]
    else:
        every = [
            (n, r, inputs, t)
            for n in (10, 100, 1000, 10_000, 100_000)
            for r in (8, 16, 32)
            for inputs in (576, 4096)
            for t in (1, 32, 512)
        ]
        cells = sorted(every, key=lambda c: (c[1] != 16, c[2] != 4096, c[0] > 10_000, c))
    for one in cells:
        if time.monotonic() > until:
            return
        yield one, cell(*one, device, 2 if interpret else 7)
