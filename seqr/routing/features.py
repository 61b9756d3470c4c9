"""||R z||^2 as an inner product of two vectors, so that scoring N adapters is one matrix product.

    ||R z||^2 = z^T G z = sum over i <= j of  w_ij G_ij  *  z_i z_j        G = R^T R, w_ii = 1, w_ij = 2

The order of the r (r + 1) / 2 pairs is that of ``torch.triu_indices``: (0,0), (0,1), ..., (0,r-1), (1,1), ...
"""

from functools import lru_cache

import torch


def feature_count(rank: int) -> int:
    """r (r + 1) / 2, the length F of a feature vector."""
    return rank * (rank + 1) // 2


def features(z: torch.Tensor) -> torch.Tensor:
    """z_i z_j for i <= j: z [T, r] fp32 -> [T, F] fp32. Row t depends on row t of z only."""
    first, second = _pairs(z.shape[1], z.device)
    return z.index_select(1, first).mul_(z.index_select(1, second))


def gram(r: torch.Tensor) -> torch.Tensor:
    """w_ij (R^T R)_ij for i <= j: r [..., r, r] -> [..., F] fp64, the other side of that inner product."""
    wide = r.detach().to("cpu", torch.float64)
    return packed(wide.mT @ wide)


def packed(form: torch.Tensor) -> torch.Tensor:
    """w_ij G_ij for i <= j of symmetric G: [..., r, r] -> [..., F]."""
    first, second = _pairs(form.shape[-1], form.device)
    weight = torch.where(first == second, 1.0, 2.0).to(form.dtype)
    return form[..., first, second] * weight


@lru_cache(maxsize=64)
def _pairs(rank: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode(False):
        first, second = torch.triu_indices(rank, rank, device=device)
        return first, second
