"""SEQR: per token and module, the adapter of largest calibrated activation norm (SEQR paper, algorithm 1)."""

import torch
import torch.nn.functional as F

from seqr.routers.interface import Activation, Batch, Mixture, ScoreRouter
from seqr.routers.mixture_model import FEW
from seqr.routers.norms import SquaredNorms, r_factors
from seqr.routers.pool import AdapterPool
from seqr.routers.statistics import Statistics
from seqr.routing.exact import Truth
from seqr.routing.per_token import Columns, Gate, route_activations
from seqr.routing.products import ExactFp32
from seqr.routing.scores import choose


class SeqrRouter(ScoreRouter):
    """score_i = (||R_i z|| - mu_i) / sigma_i, z = A x; without statistics the raw norm, sigma_i = 1 and mu_i = 0.

    An adapter whose sigma is not positive is never chosen. Where A is shared, the choice is that of the gateway's
    per-token mode: exact, in fp64 where fp32 cannot tell (``seqr.routing.exact``).
    """

    name = "seqr"

    def __init__(self, pool: AdapterPool, statistics: Statistics | None = None):
        super().__init__(pool)
        statistics = statistics or Statistics.none(pool)
        usable = statistics.sigma > 0.0
        sigma = torch.where(usable, statistics.sigma, torch.ones_like(statistics.sigma))
        self._squared = SquaredNorms(pool, sigma)
        self._offset = (statistics.mu / sigma).masked_fill(~usable, torch.nan).to(torch.float32)
        self._columns: list[Columns] = []
        self._truth: list[Truth] = []
        self._usable = usable
        self._statistics = Statistics(statistics.mu, sigma)
        self._all_in_fp64 = bool(pool.a) and pool.shared and len(pool) <= FEW and pool.a[0].device.type != "cpu"
        if pool.shared and not self._all_in_fp64:
            missing = -len(pool) % 64
            for module in range(len(pool.a)):
                r = r_factors(pool, module).to(torch.float32)
                finite = usable[module] & torch.isfinite(r).flatten(1).all(1)
                truth = Truth.of(
                    F.pad(r, (0, 0, 0, 0, 0, missing)),
                    F.pad(statistics.mu[module], (0, missing)),
                    F.pad(sigma[module], (0, missing), value=1.0),
                    F.pad(finite, (0, missing)),
                )
                offset = F.pad(self._offset[module].masked_fill(~finite, torch.nan), (0, missing), value=torch.nan)
                self._columns.append(Columns(self._squared.blocks(module), offset))
                self._truth.append(truth)

    def begin(self, batch: Batch) -> None:
        super().begin(batch)
        if self._columns:
            self._gate = Gate(F.pad(batch.allowed, (0, -len(self.pool) % 64)))

    def scores(self, activation: Activation) -> torch.Tensor:
        return self._squared(activation).sqrt() - self._offset[activation.module]

    def mixture(self, activation: Activation) -> Mixture:
        module = activation.module
        if self._all_in_fp64:
            mu, sigma = self._statistics.mu[module], self._statistics.sigma[module]
            allowed = self.batch.allowed & self._usable[module]
            return Mixture.of_one(choose_in_fp64(activation.z, r_factors(self.pool, module), mu, sigma, allowed))
        if not self._columns:
            return super().mixture(activation)
        with ExactFp32(activation.x.device.type):
            column = route_activations(activation.z, self._columns[module], self._gate, self._truth[module])
        return Mixture.of_one(column)


def choose_in_fp64(
    z: torch.Tensor, r: torch.Tensor, mu: torch.Tensor, sigma: torch.Tensor, allowed: torch.Tensor
) -> torch.Tensor:
    """The allowed column of largest (||R_i z|| - mu_i) / sigma_i, all of them in fp64 -> int64 [T], -1 for none.

    z fp32 [T, r]; r fp64 [N, r, r]; mu, sigma fp64 [N]; allowed bool [T, N]. For few adapters on a GPU, where finding
    out for which tokens fp32 is not enough takes longer than fp64 for all.
    """
    norms = torch.einsum("tj,nij->tni", z.to(torch.float64), r).square().sum(2).sqrt()
    score = (norms - mu) / sigma
    return choose(score, allowed & torch.isfinite(score))
