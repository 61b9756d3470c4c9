"""Random adapters made on the device: N of them for a site, calibrated on normal z."""

from collections.abc import Sequence

import torch

from seqr.kernels.permission_bits import pack_bits
from seqr.kernels.tables import SiteTables

USERS = 8


def random_r(modules: int, adapters: int, rank: int, device: torch.device) -> torch.Tensor:
    """R [M, N, r, r] fp32, upper triangular with a positive diagonal."""
    r = torch.randn(modules, adapters, rank, rank, device=device).triu_(1)
    return r + torch.diag_embed(torch.rand(modules, adapters, rank, device=device) + 0.5)


def blocks_of(r: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """gram fp32 [M, N / 64, F, 64], offset fp32 [M, N] and sigma fp32 [M, N], padded to ``width`` columns."""
    modules, adapters, rank, _ = r.shape
    z = torch.randn(256, rank, device=r.device)
    norms = torch.stack([(part @ z.T).square().sum(2).sqrt() for module in r for part in module.split(4096)[:1]])
    mu, sigma = norms.mean(), norms.std()
    first, second = torch.triu_indices(rank, rank, device=r.device)
    weight = torch.where(first == second, 1.0, 2.0) / sigma.square()
    gram = torch.zeros(modules, width // 64, first.shape[0], 64, device=r.device)
    for module in range(modules):
        for start in range(0, adapters, 64 * 256):
            part = r[module, start : start + 64 * 256]
            packed = (part.transpose(1, 2) @ part)[:, first, second] * weight
            padded = torch.zeros(-(-packed.shape[0] // 64) * 64, packed.shape[1], device=r.device)
            padded[: packed.shape[0]] = packed
            at = start // 64
            gram[module, at : at + padded.shape[0] // 64] = padded.view(-1, 64, packed.shape[1]).transpose(1, 2)
    offset = torch.full((modules, width), float(mu / sigma), device=r.device)
    return gram, offset, torch.full((modules, width), float(sigma), device=r.device)


def random_site(
    outputs: Sequence[int], adapters: int, rank: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> SiteTables:
    """One site's tables with b_t of entries near 0.01."""
    width = 64 * -(-adapters // 64)
    gram, offset, _ = blocks_of(random_r(len(outputs), adapters, rank, device), width)
    b_t = torch.empty(adapters, rank, sum(outputs), dtype=dtype, device=device).normal_(0.0, 0.01)
    return SiteTables.of(gram, offset, b_t, outputs)


def random_permissions(
    adapters: int, width: int, tokens: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight users who may each use about half: (bits [9, width / 32], row int32 [T])."""
    table = torch.zeros(USERS + 1, width, dtype=torch.bool)
    table[1:, :adapters] = torch.rand(USERS, adapters) < 0.5
    row = torch.randint(1, USERS + 1, (tokens,), dtype=torch.int32)
    return pack_bits(table).to(device), row.to(device)
