"""The small work of a routed Linear on a CPU, in a few compiled passes instead of some thirty calls of torch.

A decode step routes a dozen tokens at more than a hundred Linears: nothing of it is large, and calling it costs more
than computing it. The two matrix products stay torch's (``seqr.routing.products``). What is here is one thread's work
and does what the modules named at each function do (a root may differ in its last place, which torch does not round
correctly): the same operations on each token, in the same order whatever the batch, without fused multiply-adds, so
its bits do not depend on a token's neighbours or on the CPU.

Needs Numba, which compiles a function when it is first called and keeps the result on disk.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from numba import carray, njit, types
from numba.extending import intrinsic

from seqr.routing.exact import UNIT
from seqr.routing.products import COLUMN_BLOCK, ROW_TILE, block_product
from seqr.routing.scores import CLIP as _CLIP
from seqr.routing.scores import LEAST as _LEAST

F = TypeVar("F", bound=Callable[..., Any])
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

CLIP, LEAST, NOTHING = np.float32(_CLIP), np.float32(_LEAST), np.float32(-math.inf)
ROUNDING, BLOCK = 24.0 * UNIT, COLUMN_BLOCK
FOUR_UNITS = np.float32(4.0 * UNIT)


def _compiled(function: F) -> F:
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return cast(F, njit(cache=True, **options)(function))
    except RuntimeError:  # nowhere to keep it: neither beside this file nor in a home
        return cast(F, njit(**options)(function))


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(_context: Any, address: Any) -> Any:
    """A number as the address of fp32 numbers."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(address), code


def score_product(z: torch.Tensor, blocks: Sequence[torch.Tensor], rows: torch.Tensor) -> Floats:
    """``seqr.routing.products.block_product`` of z's features for K modules, each with its own -> [K, N / 64, T', 64].

    z [K, T, r]; blocks: K of [N / 64, F, 64]; rows [K, T', F]: where the features are put; their rows from T on must be
    zero.
    """
    features(z.numpy(), rows.numpy())
    product = rows.new_empty(len(blocks), blocks[0].shape[0], rows.shape[1], BLOCK)
    for of_z, its, out in zip(rows, blocks, product, strict=True):
        block_product(of_z, its, out)
    array: Floats = product.numpy()
    return array


@_compiled
def features(z: Floats, out: Floats) -> None:
    """``seqr.routing.features.features`` of K modules: z [K, T, r] -> out [K, T', F], but for its rows from T on."""
    for m in range(z.shape[0]):
        for t in range(z.shape[1]):
            k = 0
            for i in range(z.shape[2]):
                for j in range(i, z.shape[2]):
                    out[m, t, k] = z[m, t, i] * z[m, t, j]
                    k += 1


@_compiled
def _score_row(product: Floats, t: int, offset: Floats, score: Floats) -> None:
    """``seqr.routing.scores.scores`` of one token, from the product [N / 64, T', 64] into score [N]."""
    for block in range(product.shape[0]):
        start = block * BLOCK
        for j in range(BLOCK):
            q = product[block, t, j]
            # A NaN stays one.
            score[start + j] = np.sqrt(LEAST if q < LEAST else q) - offset[start + j]


@_compiled
def _best_two(
    product: Floats,
    t: int,
    offset: Floats,
    permitted: Flags,
    score: Floats,
    best: Floats,
    second: Floats,
    block_of: npt.NDArray[np.int32],
) -> tuple[np.float32, np.float32, int]:
    """The best score of one token, the next best, and the lowest column that has the best, -1 for none.

    product, offset, permitted as for ``choose_per_token``. score [N] is where the scores are put, -inf where one is not
    permitted or no number; best, second and block_of [64] are scratch: lane j sees the columns j, 64 + j, 128 + j, ...,
    and no comparison waits for another lane's, so that the processor makes many at once.
    """
    best[:], second[:], block_of[:] = NOTHING, NOTHING, 0
    for block in range(product.shape[0]):
        start = block * BLOCK
        for j in range(BLOCK):
            q = product[block, t, j]
            s = np.sqrt(LEAST if q < LEAST else q) - offset[start + j]
            s = s if permitted[t, start + j] and s < np.inf else NOTHING
            score[start + j] = s
            before = best[j]
            higher = s > before
            lower = before if higher else s
            best[j] = s if higher else before
            block_of[j] = block if higher else block_of[j]
            second[j] = lower if lower > second[j] else second[j]
    lane = 0
    for j in range(1, BLOCK):
        if best[j] > best[lane] or (best[j] == best[lane] and block_of[j] < block_of[lane]):
            lane = j
    following = second[lane]
    for j in range(BLOCK):
        if j != lane and best[j] > following:
            following = best[j]
    return best[lane], following, block_of[lane] * BLOCK + lane if best[lane] > NOTHING else -1


@_compiled
def _true_score(r: Floats, z: Floats, mu: float, sigma: float, y: Doubles) -> float:
    """``seqr.routing.exact.true_scores`` of one pair: r [r, r], z [r]; y [r] is scratch."""
    total = 0.0
    for i in range(z.shape[0]):
        y[i] = np.float64(r[i, 0]) * np.float64(z[0])
        for j in range(1, z.shape[0]):
            y[i] += np.float64(r[i, j]) * np.float64(z[j])
        total = total + y[i] * y[i] if i else y[i] * y[i]
    score: float = (np.sqrt(total) - mu) / sigma
    return score


@_compiled
def choose_per_token(
    product: Floats,
    offset: Floats,
    permitted: Flags,
    z: Floats,
    exact: bool,
    limits: Doubles,
    r: Integers,
    mu: Doubles,
    sigma: Doubles,
    column: Integers,
) -> None:
    """``seqr.routing.per_token.route`` of the product's scores for K modules -> column [K, T].

    product [K, N / 64, T', 64], offset [K, N], permitted [T, N], z [K, T, r]; with ``exact`` the exact choice, which
    wants what is in ``seqr.routing.exact.Truth``: limits [K, 4], mu and sigma [K, N], r [K], the address of each
    module's fp32 [N, r, r].
    """
    for m in range(column.shape[0]):
        _choose_per_token(
            product[m], offset[m], permitted, z[m], exact, limits[m],
            carray(_pointer(r[m]), (offset.shape[1], z.shape[2], z.shape[2]), np.float32), mu[m], sigma[m], column[m],
        )  # fmt: skip


@_compiled
def _choose_per_token(
    product: Floats,
    offset: Floats,
    permitted: Flags,
    z: Floats,
    exact: bool,
    limits: Doubles,
    r: Floats,
    mu: Doubles,
    sigma: Doubles,
    column: Integers,
) -> None:
    """Of one module. Where ``exact.doubtful`` says so, the columns within ``exact.margin`` of the best score are
    compared by their true scores; both are evaluated in fp64 here, which their slack allows for.
    """
    width, rank = offset.shape[0], z.shape[1]
    lowest, widest, slope, floor = limits[0], limits[1], limits[2], limits[3]
    score, y, lanes = np.empty(width, np.float32), np.empty(rank, np.float64), np.empty((2, BLOCK), np.float32)
    block = np.empty(BLOCK, np.int32)
    for t in range(z.shape[0]):
        best, second, at = _best_two(product, t, offset, permitted, score, lanes[0], lanes[1], block)
        column[t] = at
        if at < 0 or not exact:
            continue
        size = 0.0
        for k in range(rank):
            size += np.float64(z[t, k]) * np.float64(z[t, k])
        b = max(np.float64(best) + lowest, 0.0)
        b2 = max(np.float64(second) + lowest, b * 0.5)
        if (b - b2 - ROUNDING * widest) * b2 > size * 6.0 * slope + 8.0 * floor:
            continue
        margin = np.sqrt(size * slope + floor) + ROUNDING / 6.0 * abs(np.float64(best)) + ROUNDING / 3.0 * widest
        least, most = np.float64(best) - margin * (2.0 + 2.0**-10), -np.inf
        for n in range(width):
            if score[n] >= least and score[n] > NOTHING:
                true = _true_score(r[n], z[t], mu[n], sigma[n], y)
                if true > most:
                    most, column[t] = true, n


@_compiled
def gather_evidence(
    product: Floats,
    offset: Floats,
    units: Floats,
    slots: Integers,
    first: Integers,
    last: Integers,
    permitted: Flags,
    somebody: Flags,
    sums: Doubles,
    value: Doubles,
    column: Integers,
) -> None:
    """``seqr.routing.evidence.EvidencePass.route`` of the product's scores for K modules, in turn -> column [K, T].

    product [K, N / 64, T', 64], offset [K, N]; units [T]: each token's weight times 2^20; slots, first, last [S]: the
    runs of ``Spans``; permitted [T, N] and whether it permits anybody, somebody [T]; sums [K, slots + 1, N] and value
    [T, N], both brought forward. The value of a token for whom nobody may be chosen is left as it is: nobody asks for
    it.
    """
    for m in range(column.shape[0]):
        _gather_evidence(
            product[m], offset[m], units, slots, first, last, permitted, somebody, sums[m], value, column[m]
        )


@_compiled
def _gather_evidence(
    product: Floats,
    offset: Floats,
    units: Floats,
    slots: Integers,
    first: Integers,
    last: Integers,
    permitted: Flags,
    somebody: Flags,
    sums: Doubles,
    value: Doubles,
    column: Integers,
) -> None:
    """Of one module."""
    width = offset.shape[0]
    score, unit = np.empty(width, np.float32), np.empty(width, np.float32)
    for run in range(slots.shape[0]):
        gathered = sums[slots[run]]
        for t in range(first[run], last[run] + 1):
            column[t] = -1
            weight = units[t]
            if weight == 0.0 and not somebody[t]:
                continue
            _score_row(product, t, offset, score)
            for n in range(width):
                s = score[n]
                s = s if abs(s) < np.inf else -CLIP
                s = -CLIP if s < -CLIP else s
                s = CLIP if s > CLIP else s
                unit[n] = np.rint(s * weight)
            for n in range(width):
                gathered[n] += unit[n]
            if not somebody[t]:
                continue
            best = -np.inf
            for n in range(width):
                value[t, n] += gathered[n]
            for n in range(width):
                if value[t, n] > best and permitted[t, n] and score[n] < np.inf:
                    best, column[t] = value[t, n], n


@_compiled
def add_rows(y: Floats, z: Floats, b_t: Integers, column: Integers) -> None:
    """y[t] += z[t] B_i^T for the adapter i = column[t], nothing where it is -1: y [T, m], z [T, r] in place.

    b_t [N]: the addresses of the adapters' B_i^T, fp32 [r, m] each, contiguous.
    """
    rank, outputs = z.shape[1], y.shape[1]
    share = np.empty(outputs, np.float32)
    for t in range(y.shape[0]):
        if column[t] < 0:
            continue
        b = carray(_pointer(b_t[column[t]]), (rank, outputs), np.float32)
        share[:] = np.float32(0.0)
        even = rank - rank % 4
        for k in range(0, even, 4):
            z0, z1, z2, z3 = z[t, k], z[t, k + 1], z[t, k + 2], z[t, k + 3]
            for j in range(outputs):
                share[j] += (z0 * b[k, j] + z1 * b[k + 1, j]) + (z2 * b[k + 2, j] + z3 * b[k + 3, j])
        for k in range(even, rank):
            for j in range(outputs):
                share[j] += z[t, k] * b[k, j]
        for j in range(outputs):
            y[t, j] += share[j]


@_compiled
def _leaf_scores(of_z: Floats, gram: Floats, offset: Floats, member: Flags, score: Floats) -> None:
    """The scores of one leaf's members, of_z [F], gram [F, L], offset [L] -> score [L]; -inf where not member [L]."""
    score[:] = np.float32(0.0)
    even = of_z.shape[0] - of_z.shape[0] % 4
    for k in range(0, even, 4):
        f0, f1, f2, f3 = of_z[k], of_z[k + 1], of_z[k + 2], of_z[k + 3]
        for m in range(score.shape[0]):
            score[m] += (f0 * gram[k, m] + f1 * gram[k + 1, m]) + (f2 * gram[k + 2, m] + f3 * gram[k + 3, m])
    for k in range(even, of_z.shape[0]):
        for m in range(score.shape[0]):
            score[m] += of_z[k] * gram[k, m]
    for m in range(score.shape[0]):
        s = np.sqrt(LEAST if score[m] < LEAST else score[m]) - offset[m]
        score[m] = s if member[m] and s < np.inf else NOTHING


@_compiled
def _leaf_bounds(q: Floats, reach: Floats, ceiling: Floats, floor: np.float32, wide: np.float32, out: Floats) -> None:
    """``seqr.routing.search.SearchIndex.bounds`` of one token, from the leaves' q [B] -> [B].

    -inf where it is no number and where a leaf has nobody, ceiling [B]. floor, wide: 2 A and 8 u omax of ``Truth``.
    """
    for b in range(q.shape[0]):
        raised = q[b] + floor
        bound = np.sqrt(LEAST if raised < LEAST else raised) - reach[b]
        bound = bound + abs(bound) * FOUR_UNITS + wide
        bound = bound if bound < ceiling[b] else ceiling[b]
        out[b] = bound if abs(bound) < np.inf else NOTHING


@_compiled
def search_leaves(
    product: Floats,
    reach: Floats,
    ceiling: Floats,
    of_z: Floats,
    gram: Floats,
    offset: Floats,
    member: Flags,
    columns: Integers,
    z: Floats,
    limits: Doubles,
    r: Floats,
    mu: Doubles,
    sigma: Doubles,
    column: Integers,
) -> None:
    """``seqr.routing.search.SearchIndex.route`` from the product of the leaves' bounds -> column [T].

    product [T, B]; reach [B] and ceiling [T, B]: see ``_leaf_bounds``; of_z [T, F]: the features of z; gram [B, F, L],
    offset and columns [B, L]: the members, L to a leaf; member [T, B, L]: those that are permitted. z, limits, r, mu,
    sigma: as for ``choose_per_token``.
    """
    leaves, size = columns.shape
    widest, slope, floor = limits[1], limits[2], limits[3]
    score, y = np.empty(size, np.float32), np.empty(z.shape[1], np.float64)
    bound, kept = np.empty(leaves, np.float32), np.empty(leaves * size, np.float32)
    kept_column = np.empty(leaves * size, np.int64)
    raised, wide = np.float32(2.0 * floor), np.float32(ROUNDING / 3.0 * widest)
    for t in range(z.shape[0]):
        column[t] = -1
        length = 0.0
        for k in range(z.shape[1]):
            length += np.float64(z[t, k]) * np.float64(z[t, k])
        # ``exact.margin``, but for the part that grows with the best score.
        fixed = np.sqrt(length * slope + floor) + ROUNDING / 3.0 * widest
        _leaf_bounds(product[t], reach, ceiling[t], raised, wide, bound)
        first, largest = -1, NOTHING
        for b in range(leaves):
            if bound[b] > largest:
                first, largest = b, bound[b]
        if first < 0:
            continue
        # The leaf of largest bound, then each whose bound may still win.
        best, least, count = NOTHING, -np.inf, 0
        for step in range(-1, leaves):
            b = first if step < 0 else step
            if bound[b] < least or bound[b] == NOTHING or step == first:
                continue
            _leaf_scores(of_z[t], gram[b], offset[b], member[t, b], score)
            for m in range(size):
                if score[m] > best:
                    best = score[m]
                    least = best - (fixed + ROUNDING / 6.0 * abs(np.float64(best))) * (2.0 + 2.0**-10)
                if score[m] > NOTHING and score[m] >= least:
                    kept[count], kept_column[count] = score[m], columns[b, m]
                    count += 1
        most, rivals, at = -np.inf, 0, -1
        for k in range(count):
            if kept[k] >= least and kept_column[k] != at:
                rivals, at = rivals + 1, kept_column[k]
        column[t] = at
        if rivals < 2:
            continue
        for k in range(count):
            if kept[k] >= least:
                n = kept_column[k]
                true = _true_score(r[n], z[t], mu[n], sigma[n], y)
                if true > most or (true == most and n < column[t]):
                    most, column[t] = true, n


def compile_now() -> None:
    """Compile every pass, or fetch it from disk, so that no answer waits for it."""
    floats, place, ones = np.ones((1, 1), np.float32), np.zeros(1, np.int64), np.ones((1, BLOCK))
    product, offset = np.ones((1, 1, ROW_TILE, BLOCK), np.float32), np.zeros((1, BLOCK), np.float32)
    permitted, somebody, sums = np.ones((1, BLOCK), np.bool_), np.ones(1, np.bool_), np.zeros((1, 1, BLOCK))
    features(floats[None], floats[None].copy())
    r, column = np.ones((BLOCK, 1, 1), np.float32), np.zeros((1, 1), np.int64)
    address = np.array([r.ctypes.data])
    choose_per_token(
        product, offset, permitted, floats[None], True, np.ones((1, 4)), address, ones, ones, column.copy()
    )
    units = np.ones(1, np.float32)
    gather_evidence(product, offset, units, place, place, place, permitted, somebody, sums, ones.copy(), column.copy())
    add_rows(floats.copy(), floats, np.array([floats.ctypes.data]), np.zeros(1, np.int64))
