"""The shared matrix A: drawn from the plan's seed by everyone, sent by no one, checked by digest.

The draw must give the same bits everywhere. NumPy promises a stable stream for the raw Philox integers, but not for
``standard_normal``, and log, sin and cos of libm differ in the last place between platforms. So the raw integers become
normals through Wichura's AS 241 inverse of the normal distribution, evaluated with nothing but ``+ - * /`` and square
root, which IEEE 754 defines to the last bit; the one logarithm it needs is a series of the same operations.
"""

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from seqr.canonical import array_digest
from seqr.errors import SeqrError

if TYPE_CHECKING:
    import torch

    from seqr.plan import Plan

Float64 = npt.NDArray[np.float64]

# Wichura, "Algorithm AS 241: The percentage points of the normal distribution", Applied Statistics 37 (1988), PPND16.
# Highest power first.
_CENTRE_NUM = (
    2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457,
    13731.693765509461125, 1971.5909503065514427, 133.14166789178437745, 3.387132872796366608,
)  # fmt: skip
_CENTRE_DEN = (
    5226.495278852854561, 28729.085735721942674, 39307.89580009271061, 21213.794301586595867,
    5394.1960214247511077, 687.1870074920579083, 42.313330701600911252, 1.0,
)  # fmt: skip
_MIDDLE_NUM = (
    7.7454501427834140764e-4, 0.0227238449892691845833, 0.24178072517745061177, 1.27045825245236838258,
    3.64784832476320460504, 5.7694972214606914055, 4.6303378461565452959, 1.42343711074968357734,
)  # fmt: skip
_MIDDLE_DEN = (
    1.05075007164441684324e-9, 5.475938084995344946e-4, 0.0151986665636164571966, 0.14810397642748007459,
    0.68976733498510000455, 1.6763848301838038494, 2.05319162663775882187, 1.0,
)  # fmt: skip
_TAIL_NUM = (
    2.01033439929228813265e-7, 2.71155556874348757815e-5, 1.24266094738807843860e-3, 0.026532189526576123093,
    0.29656057182850489123, 1.7848265399172913358, 5.4637849111641143699, 6.6579046435011037772,
)  # fmt: skip
_TAIL_DEN = (
    2.04426310338993978564e-15, 1.4215117583164458887e-7, 1.8463183175100546818e-5, 7.868691311456132591e-4,
    0.0148753612908506148525, 0.13692988092273580531, 0.59983220655588793769, 1.0,
)  # fmt: skip
_LN2 = 0.6931471805599453
_SQRT_HALF = 0.7071067811865476


class SharedAMismatch(SeqrError):
    """The A drawn here is not the A of the plan."""

    code = "shared_a_mismatch"


def draw_a(seed: int, module: str, rank: int, in_features: int) -> "torch.Tensor":
    """The shared A of one module: fp32 tensor [rank, in_features], entries N(0, 1/rank^2), the same bits everywhere.

    Keyed by SHA-256 of (seed, module), so neither the order nor the number of modules matters.
    """
    import torch

    return torch.from_numpy(draw_a_array(seed, module, rank, in_features))


def draw_a_array(seed: int, module: str, rank: int, in_features: int) -> npt.NDArray[np.float32]:
    """``draw_a`` without torch: fp32 array [rank, in_features]."""
    key = hashlib.sha256(b"seqr/shared-a/v1\0" + seed.to_bytes(8, "big") + module.encode("utf-8")).digest()
    philox = np.random.Philox(key=np.frombuffer(key[:16], dtype="<u8").astype(np.uint64))
    raw = philox.random_raw(rank * in_features)
    # 52 bits and a half: exact in a double, symmetric about 1/2, never 0 or 1.
    uniform = ((raw >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return (inverse_normal(uniform) / float(rank)).astype(np.float32).reshape(rank, in_features)


def digest_a(tensor: "torch.Tensor") -> str:
    """SHA-256 (hex) of an A: over its dtype, shape and little-endian bytes."""
    return array_digest(tensor.detach().cpu().numpy())


def verify_a(plan: "Plan") -> "dict[str, torch.Tensor]":
    """Draw every A of ``plan`` and check it against the plan's digest.

    Returns fp32 [rank, in_features] per module name; raises ``SharedAMismatch`` naming the first module that differs.
    """
    drawn = {}
    for module in plan.modules:
        a = draw_a(plan.seed, module.name, plan.rank, module.in_features)
        expected, got = plan.a_digests[module.name], digest_a(a)
        if got != expected:
            raise SharedAMismatch(
                f"the shared A drawn here for module {module.name} has digest {got[:16]}…, plan {plan.plan_id} expects "
                f"{expected[:16]}…; this machine draws another A and must not take part"
            )
        drawn[module.name] = a
    return drawn


def inverse_normal(p: Float64) -> Float64:
    """The standard normal quantile of ``p`` in (0, 1), fp64, elementwise, with a relative error of about 1e-16."""
    q = p - 0.5
    near = 0.180625 - q * q
    value = q * _polynomial(_CENTRE_NUM, near) / _polynomial(_CENTRE_DEN, near)
    outer = np.abs(q) > 0.425
    tail = np.sqrt(-_log(np.where(q < 0.0, p, 1.0 - p)[outer]))
    middle, far = tail - 1.6, tail - 5.0
    size = np.where(
        tail <= 5.0,
        _polynomial(_MIDDLE_NUM, middle) / _polynomial(_MIDDLE_DEN, middle),
        _polynomial(_TAIL_NUM, far) / _polynomial(_TAIL_DEN, far),
    )
    value[outer] = np.where(q[outer] < 0.0, -size, size)
    return value


def _polynomial(coefficients: tuple[float, ...], x: Float64) -> Float64:
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


def _log(x: Float64) -> Float64:
    """log x = e ln 2 + 2 artanh((m - 1) / (m + 1)) with x = m 2^e and m in [sqrt(1/2), sqrt 2)."""
    mantissa, exponent = np.frexp(x)
    low = mantissa < _SQRT_HALF
    mantissa = np.where(low, mantissa * 2.0, mantissa)
    exponent = np.where(low, exponent - 1, exponent)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    series = _polynomial(tuple(1.0 / k for k in range(23, 0, -2)), s * s)
    return exponent.astype(np.float64) * _LN2 + 2.0 * s * series
