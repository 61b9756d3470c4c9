"""s B = Q R, the form in which an adapter leaves a silo (SEQR paper, equation 4)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from seqr.errors import SeqrError


class FactorizationRefused(SeqrError):
    """A B that has no reduced QR factors of the promised shapes: fewer rows than columns, or not finite."""

    code = "factorization_refused"


def factorize(b: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Reduced QR of ``scale * b``: the same B and scale give the same bytes.

    b [m, r] -> (q [m, r], r [r, r]), both fp32 on the CPU: q with orthonormal columns, r upper triangular with a
    diagonal >= 0, which makes the factors of a B of full rank unique. Computed in fp64 with Householder reflections, so
    q is orthonormal for a B of any rank; a B that lacks rank gets a (nearly) zero diagonal in r, and B = 0 gets r = 0.
    Raises ``FactorizationRefused``.
    """
    if b.dim() != 2 or b.shape[0] < b.shape[1]:
        raise FactorizationRefused(f"B must have at least as many rows as columns, got shape {tuple(b.shape)}")
    scaled = b.detach().to("cpu", torch.float64) * scale
    if not bool(torch.isfinite(scaled).all()):
        raise FactorizationRefused("B or the LoRA scale holds a value that is not finite; the training diverged")
    with _one_thread():
        q, r = torch.linalg.qr(scaled, mode="reduced")
    sign = torch.where(r.diagonal() < 0, -1.0, 1.0).to(torch.float64)
    return (q * sign).to(torch.float32).contiguous(), (sign[:, None] * r).triu().to(torch.float32).contiguous()


@contextmanager
def _one_thread() -> Iterator[None]:
    # The order of a parallel sum depends on the number of threads, and the adapter's digest on every last bit.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
