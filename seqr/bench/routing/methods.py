"""Every routing method of the papers over one shelf of adapters, from x to the choice, each in its fastest form here.

All of them compute z = A x themselves where they use it, all of them end in the same choice among the permitted, and
all but ARROW (which its paper does not calibrate) compare (norm - mu) / sigma, with sigma folded into what is stored.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from seqr.bench.routing.adapters import Shelf
from seqr.routing.features import feature_count
from seqr.routing.per_token import Gate, Together, route_together
from seqr.routing.products import ExactFp32, project

LAG_K = 20
METHODS = ("naive", "spectr", "lag", "arrow", "paper", "paper, rearranged", "ours", "ours, exact")
_NAIVE_BYTES = 1 << 26
_BLOCK = 64


@dataclass(frozen=True)
class Cell:
    """One point of the grid; m = n."""

    adapters: int
    rank: int
    width: int
    tokens: int

    def __str__(self) -> str:
        return f"N={self.adapters}, r={self.rank}, n={self.width}, T={self.tokens}"


@dataclass(frozen=True)
class Method:
    """A way to route: ``run`` takes x to int64 [T]."""

    run: Callable[[], torch.Tensor]
    weight_bytes: int


def flops(method: str, cell: Cell) -> int:
    """Multiplications and additions per batch, of the products and norms; the choice itself is left out."""
    n_adapters, r, n, t = cell.adapters, cell.rank, cell.width, cell.tokens
    z, count = 2 * n * r, feature_count(r)
    per_token = {
        "naive": z + 2 * n_adapters * n * r + 2 * n_adapters * n,
        "spectr": 2 * n_adapters * r * n + 2 * n_adapters * r,
        "lag": 2 * n_adapters * n + _lag_norms(cell) * (2 * r * n + 2 * r),
        "arrow": 2 * n_adapters * n,
        "paper": z + 2 * n_adapters * r * r + 2 * n_adapters * r,
        "ours": z + count + 2 * n_adapters * count,
    }
    return t * per_token[method.partition(",")[0]]


def _lag_norms(cell: Cell) -> int:
    """How many norms a token costs: k, or all where gathering k for each token is more work (``_Weights.lag``)."""
    k = min(LAG_K, cell.adapters)
    return k if cell.tokens * k < cell.adapters else cell.adapters


def weight_bytes(method: str, cell: Cell) -> int:
    """What a method keeps resident to route, in fp32; naive and spectr could use it for y as well."""
    n_adapters, r, n = cell.adapters, cell.rank, cell.width
    each = {
        "naive": r * n,
        "spectr": r * n,
        "lag": r * n + n,
        "arrow": n,
        "paper": r * r,
        "ours": feature_count(r),
        "ours, exact": feature_count(r) + r * r + 8,
    }
    shared = 0 if method in ("spectr", "lag", "arrow") else r * n
    return 4 * (n_adapters * each[method if method in each else method.partition(",")[0]] + shared)


def temporary_bytes(method: str, cell: Cell) -> int:
    """About what a batch makes on the way: to see what fits before it is tried; the report has the measured figure."""
    n_adapters, r, n, t = cell.adapters, cell.rank, cell.width, cell.tokens
    scores = 4 * t * n_adapters
    return {
        "naive": scores + 2 * _NAIVE_BYTES,
        "spectr": scores * (r + 2),
        "lag": scores * (r + 2) if _lag_norms(cell) == n_adapters else scores * 2 + 4 * t * LAG_K * r * n,
        "arrow": scores * 2,
        "paper": scores * (r + 2),
        "ours": scores * 2,
    }[method.partition(",")[0]]


def prepare(method: str, cell: Cell, shelf: Shelf, a: torch.Tensor, x: torch.Tensor, permitted: torch.Tensor) -> Method:
    """``method`` with its weights laid out: a fp32 [r, n], x fp32 [T, n], permitted bool [T, N']."""
    run = _Weights(cell, shelf, a, x, permitted).of(method)

    def guarded() -> torch.Tensor:
        with ExactFp32("cpu"):
            return run()

    return Method(guarded, weight_bytes(method, cell))


class _Weights:
    def __init__(self, cell: Cell, shelf: Shelf, a: torch.Tensor, x: torch.Tensor, permitted: torch.Tensor):
        self.cell, self.shelf, self.a, self.x, self.permitted = cell, shelf, a, x, permitted
        self.scaled = (shelf.r / shelf.sigma[:, None, None]).to(torch.float32)
        self.offset = (shelf.mu / shelf.sigma).to(torch.float32)
        allowed = permitted[:, : cell.adapters]
        self.ceiling = torch.full(allowed.shape, -torch.inf).masked_fill_(allowed, torch.inf)

    def of(self, method: str) -> Callable[[], torch.Tensor]:
        make: dict[str, Callable[[], Callable[[], torch.Tensor]]] = {
            "naive": self.naive,
            "spectr": self.spectr,
            "lag": self.lag,
            "arrow": self.arrow,
            "paper": self.paper,
            "paper, rearranged": self.paper_rearranged,
            "ours": lambda: self.ours(exact=False),
            "ours, exact": lambda: self.ours(exact=True),
        }
        return make[method]()

    def naive(self) -> Callable[[], torch.Tensor]:
        """||B_i A x||, B_i = Q R_i [m, r]. One Q serves all here: it changes neither norms nor time."""
        cell, a_t, x = self.cell, self.a.T, self.x
        q = torch.linalg.qr(torch.randn(cell.width, cell.rank, generator=torch.Generator().manual_seed(1)))[0]
        b = (q @ self.scaled).flatten(0, 1)
        at_once = max(1, _NAIVE_BYTES // (4 * cell.tokens * cell.width))

        def run() -> torch.Tensor:
            z = x @ a_t
            norms = [
                torch.linalg.vector_norm((z @ part.T).view(cell.tokens, -1, cell.width), dim=2)
                for part in torch.split(b, at_once * cell.width)
            ]
            return self.choose(torch.cat(norms, dim=1).sub_(self.offset))

        return run

    def spectr(self) -> Callable[[], torch.Tensor]:
        """||S_i V_i^T x||, the fair form for a shared A; R_i A is S_i V_i^T up to a rotation, with the same norms."""
        cell, x = self.cell, self.x
        weights = (self.scaled @ self.a).flatten(0, 1)

        def run() -> torch.Tensor:
            hidden = (x @ weights.T).view(cell.tokens, cell.adapters, cell.rank)
            return self.choose(torch.linalg.vector_norm(hidden, dim=2).sub_(self.offset))

        return run

    def arrows(self) -> torch.Tensor:
        """v_i, the first right singular vector of R_i A: fp32 [N, n]."""
        q, lower = torch.linalg.qr(self.a.T)
        v_t = torch.linalg.svd(self.shelf.r @ lower.T)[2]
        return torch.matmul(v_t[:, 0], q.T)

    def arrow(self) -> Callable[[], torch.Tensor]:
        x, arrows = self.x, self.arrows()
        return lambda: self.choose((x @ arrows.T).abs_())

    def lag(self) -> Callable[[], torch.Tensor]:
        """The k best arrows, then SPECTR among them: of those alone, or of all where gathering those is more work."""
        cell, x, arrows = self.cell, self.x, self.arrows()
        weights, k = self.scaled @ self.a, min(LAG_K, cell.adapters)
        stacked = weights.flatten(0, 1)

        def norms_of(kept: torch.Tensor) -> torch.Tensor:
            norms: torch.Tensor
            if cell.tokens * k < cell.adapters:
                norms = torch.linalg.vector_norm(torch.einsum("tkrn,tn->tkr", weights[kept], x), dim=2)
                return norms
            hidden = (x @ stacked.T).view(cell.tokens, cell.adapters, cell.rank)
            norms = torch.linalg.vector_norm(hidden, dim=2)
            return norms.gather(1, kept)

        def run() -> torch.Tensor:
            kept = (x @ arrows.T).abs_().clamp_max_(self.ceiling).topk(k, dim=1).indices
            score = norms_of(kept).sub_(self.offset[kept]).clamp_max_(self.ceiling.gather(1, kept))
            return kept.gather(1, score.argmax(1, keepdim=True)).squeeze(1)

        return run

    def paper(self) -> Callable[[], torch.Tensor]:
        """Algorithm 1: all R_i stacked, one product [T, N r], the norm of each group of r."""
        cell, a_t, x, stacked = self.cell, self.a.T, self.x, self.scaled.flatten(0, 1)

        def run() -> torch.Tensor:
            hidden = ((x @ a_t) @ stacked.T).view(cell.tokens, cell.adapters, cell.rank)
            return self.choose(torch.linalg.vector_norm(hidden, dim=2).sub_(self.offset))

        return run

    def paper_rearranged(self) -> Callable[[], torch.Tensor]:
        """The same, with row j of all R_i side by side: the norm then adds up r whole matrices, which vectorises."""
        a_t, x = self.a.T, self.x
        rows = self.scaled.permute(1, 2, 0).contiguous()

        def run() -> torch.Tensor:
            return self.choose(torch.matmul(x @ a_t, rows).square_().sum(0).sqrt_().sub_(self.offset))

        return run

    def ours(self, exact: bool) -> Callable[[], torch.Tensor]:
        """The product: ``project`` and ``route_together``, as the routed Linear calls them for a site of one module."""
        a_t, x, gate = self.a.contiguous().T, self.x, Gate(self.permitted)
        modules = Together((self.shelf.columns,), (self.shelf.truth,) if exact else ())
        return lambda: route_together(project(x, a_t)[None, : x.shape[0]], modules, gate)[0]

    def choose(self, score: torch.Tensor) -> torch.Tensor:
        """The permitted argmax in the way that is fastest for all: largest of each block first. Spoils ``score``."""
        tokens, count = score.shape
        block = max(size for size in range(1, _BLOCK + 1) if count % size == 0)
        blocks = score.clamp_max_(self.ceiling).view(tokens, -1, block)
        which = blocks.amax(2).argmax(1)
        row = blocks.view(-1, block).index_select(0, which + torch.arange(0, tokens * (count // block), count // block))
        return which * block + row.argmax(1)
