"""Adapters, tokens and permissions for one site, and the plain fp64 meaning that every kernel is compared with."""

import math
from dataclasses import dataclass

import torch

from seqr.kernels.permission_bits import pack_bits
from seqr.kernels.tables import SiteTables
from seqr.routing.features import gram
from seqr.routing.products import column_blocks
from seqr.routing.reference import reference_choice, reference_score, reference_score_error

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Of 12 adapters, by popularity; "all distinct" comes first so that every test can be given all of them.
POPULARITY = {
    "all distinct": [*range(12)],
    "uniform": [7, 2, 11, 0, 4, 9, 2, 5, 1, 8, 3, 10, 6, 0, 7, 3, 9],
    "zipf": [0] * 16 + [1] * 8 + [2] * 5 + [3] * 4 + [4, 4, 5, 6, 7, 11],
    "all the same": [3] * 34,
    "some nobody": [-1, 3, -1, -1, 0, 3, 0, -1],
    "all nobody": [-1] * 9,
    "one token": [2],
}


@dataclass
class World:
    """M modules of N adapters: r [M, N, r, r], mu and sigma [M, N], b [M][N, m, r], z fp32 [T, M r]."""

    r: torch.Tensor
    mu: torch.Tensor
    sigma: torch.Tensor
    b: list[torch.Tensor]
    z: torch.Tensor
    tables: SiteTables

    @property
    def rank(self) -> int:
        return self.r.shape[-1]

    def own_z(self, module: int, token: int) -> torch.Tensor:
        return self.z[token, module * self.rank : (module + 1) * self.rank].cpu()

    def scores(self, module: int, token: int) -> list[float]:
        z = self.own_z(module, token)
        parts = zip(self.r[module], self.mu[module].tolist(), self.sigma[module].tolist(), strict=True)
        return [reference_score(r, mu, sigma, z) for r, mu, sigma in parts]

    def check_choice(self, module: int, token: int, permitted: list[bool], chosen: int) -> None:
        """``chosen`` is the fp64 choice, or as good within what fp32 may round."""
        scores = self.scores(module, token)
        best = reference_choice(scores, permitted)
        if chosen == best:
            return
        assert chosen >= 0 and permitted[chosen] and math.isfinite(scores[chosen]), (chosen, best)
        slack = 0.0
        for i in (chosen, best):
            mu, sigma = float(self.mu[module, i]), float(self.sigma[module, i])
            slack += reference_score_error(self.r[module, i], mu, sigma, self.own_z(module, token))
        assert scores[best] - scores[chosen] <= slack, (chosen, best)


def random_world(
    tokens: int = 20,
    adapters: int = 12,
    rank: int = 8,
    outputs: tuple[int, ...] = (40, 24, 24),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    whole: bool = False,
) -> World:
    """Random upper triangular R; with ``whole``, small whole numbers, so that every score is exact in fp32."""
    g = torch.Generator().manual_seed(seed)
    modules = len(outputs)
    r = torch.randn(modules, adapters, rank, rank, generator=g).triu()
    mu, sigma = torch.rand(modules, adapters, generator=g) + 1.0, torch.rand(modules, adapters, generator=g) + 0.5
    z = torch.randn(tokens, modules * rank, generator=g)
    if whole:
        r, z = r.mul(2).round(), z.mul(2).round()
        mu, sigma = mu.mul(4).round(), torch.ones_like(sigma)
    b = [torch.randn(adapters, width, rank, generator=g) for width in outputs]
    return World(r, mu, sigma, b, z.to(DEVICE), tables_of(r, mu, sigma, b, dtype))


def tables_of(
    r: torch.Tensor, mu: torch.Tensor, sigma: torch.Tensor, b: list[torch.Tensor], dtype: torch.dtype
) -> SiteTables:
    """As ``seqr.library`` stacks them: vech(R^T R) / sigma^2 in blocks of 64 columns, NaN for what cannot be used."""
    grams, offsets = [], []
    for module in range(len(b)):
        usable = (sigma[module] > 0) & torch.isfinite(r[module]).flatten(1).all(1)
        columns = [gram(one) / float(s) ** 2 for one, s in zip(r[module], sigma[module], strict=True)]
        grams.append(column_blocks(torch.stack(columns).float()))
        offset = torch.zeros(grams[-1].shape[0] * 64)
        offset[: len(columns)] = torch.where(usable, mu[module] / sigma[module], math.nan)
        offsets.append(offset)
    b_t = torch.cat([part.transpose(1, 2) for part in b], dim=2).to(dtype)
    outputs = [part.shape[1] for part in b]
    return SiteTables.of(
        torch.stack(grams).to(DEVICE), torch.stack(offsets).to(DEVICE), b_t.contiguous().to(DEVICE), outputs
    )


def rows_for(sets: list[list[int]], tables: SiteTables) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A permission table with a row per set after row 0: (bool [rows, N], bits, and row 1 + t for token t)."""
    table = torch.zeros(len(sets) + 1, tables.adapters, dtype=torch.bool)
    for row, columns in enumerate(sets, 1):
        table[row, columns] = True
    row = torch.arange(1, len(sets) + 1, dtype=torch.int32)
    return table, pack_bits(table.to(DEVICE)), row.to(DEVICE)
