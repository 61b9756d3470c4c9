"""||B_i A_i x|| for every adapter and token, in the three forms that the papers use; all are the same number."""

import torch

from seqr.routers.interface import Activation
from seqr.routers.pool import AdapterPool
from seqr.routing.features import features, gram
from seqr.routing.products import ExactFp32, column_blocks, score_product


class SquaredNorms:
    """||R_i z_i||^2 / sigma_i^2 with B_i = Q_i R_i: SEQR's form, one product over vech features when A is shared."""

    def __init__(self, pool: AdapterPool, sigma: torch.Tensor):
        """sigma fp64 [modules, N]."""
        self._shared = pool.shared
        self._width = len(pool)
        self._stacks = [self._stack(pool, module, sigma[module]) for module in range(len(pool.a))]

    def __call__(self, activation: Activation) -> torch.Tensor:
        """fp32 [T, N], never negative."""
        stack, z = self._stacks[activation.module], activation.z
        with ExactFp32(z.device.type):
            if self._shared:
                return score_product(features(z), stack)[:, : self._width].clamp_min(0.0)
            # One product per adapter: each has a z of its own.
            return torch.einsum("nij,tnj->nti", stack, z).square().sum(2).T

    def blocks(self, module: int) -> torch.Tensor:
        """For a shared A: the columns of ``seqr.routing.scores.scores``, fp32 [ceil(N / 64), F, 64]."""
        return self._stacks[module]

    def _stack(self, pool: AdapterPool, module: int, sigma: torch.Tensor) -> torch.Tensor:
        factors = r_factors(pool, module)
        if not self._shared:
            return torch.stack([r / s for r, s in zip(factors, sigma, strict=True)]).to(torch.float32)
        each = zip(factors.cpu(), sigma.cpu(), strict=True)
        grams = torch.stack([gram(r) / s / s for r, s in each]).to(torch.float32)
        return column_blocks(grams.to(factors.device))


def r_factors(pool: AdapterPool, module: int) -> torch.Tensor:
    """R_i of B_i = Q_i R_i in one module: fp64 [N, r, r], rounded to fp32 as an adapter holds it.

    All NaN for a B that is not finite. Factorized on the CPU, which is faster at many small matrices than a GPU, and
    once per pool.
    """
    if module not in pool.kept_r:
        factors = []
        for b_t in pool.b_t[module].cpu():
            finite = bool(torch.isfinite(b_t).all())
            r = _triangle(b_t.T) if finite else b_t.new_full((b_t.shape[0],) * 2, torch.nan)
            factors.append(r.to(torch.float32))
        pool.kept_r[module] = torch.stack(factors).to(pool.b_t[module].device)
    return pool.kept_r[module].to(torch.float64)


def _triangle(b: torch.Tensor) -> torch.Tensor:
    triangle: torch.Tensor = torch.linalg.qr(b.to(torch.float64)).R
    return triangle


class Spectrum:
    """B_i A_i = U S V^T: what ARROW (v_1 of each), SPECTR (S V^T) and LAG (both) store, per module.

    arrow fp32 [N, n]; scaled fp32 [N, r, n].
    """

    def __init__(self, pool: AdapterPool):
        self.arrow: list[torch.Tensor] = []
        self.scaled: list[torch.Tensor] = []
        for module in range(len(pool.a)):
            a, b_t, device = pool.a[module].cpu(), pool.b_t[module].cpu(), pool.a[module].device
            both = [thin_svd(a if pool.shared else a[i], b_t[i].T) for i in range(len(pool))]
            self.arrow.append(torch.stack([v_t[0] for _, v_t in both]).to(device))
            self.scaled.append(torch.stack([s[:, None] * v_t for s, v_t in both]).to(device))

    def norms(self, activation: Activation) -> torch.Tensor:
        """||S_i V_i^T x||: fp32 [T, N].

        S belongs in it: ||V^T x|| alone is the same for all adapters that share A.
        """
        scaled = self.scaled[activation.module]
        count, rank, inputs = scaled.shape
        with ExactFp32(activation.x.device.type):
            hidden = activation.x32 @ scaled.reshape(count * rank, inputs).T
            return hidden.view(-1, count, rank).square().sum(2).sqrt()

    def arrows(self, activation: Activation) -> torch.Tensor:
        """|v_1^T x| with v_1 the first right singular vector: fp32 [T, N] (Ostapenko et al. 2024)."""
        with ExactFp32(activation.x.device.type):
            return (activation.x32 @ self.arrow[activation.module].T).abs()


def thin_svd(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """S fp32 [r] (descending) and V^T fp32 [r, n] of the rank-r product b a, without forming it: a [r, n], b [m, r].

    All NaN where a or b is not finite: such an adapter has no singular vectors and is never chosen.
    """
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return a.new_full((a.shape[0],), torch.nan), torch.full_like(a, torch.nan)
    q_a, r_a = torch.linalg.qr(a.to(torch.float64).T)
    r_b = torch.linalg.qr(b.to(torch.float64)).R
    _, s, v_t = torch.linalg.svd(r_b @ r_a.T)
    return s.to(torch.float32), (v_t @ q_a.T).to(torch.float32)
