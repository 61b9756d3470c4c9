"""Per-token routing: the paper's, provably the largest calibrated activation norm (SEQR paper, theorem 3.3)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from seqr.routing.exact import Flags, Truth, doubtful, settle
from seqr.routing.features import feature_count, features
from seqr.routing.optional import compiled
from seqr.routing.products import COLUMN_BLOCK, ROW_TILE, block_product
from seqr.routing.scores import LEAST, choose, places, scores, usable

Arrays = tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.float64]]


def route(score: torch.Tensor, permitted: torch.Tensor) -> torch.Tensor:
    """argmax of the score over the permitted set, token by token.

    score [T, N] fp32, permitted [T, N] bool -> int64 [T]: the column, or -1 where nothing is permitted. A score that is
    not finite never wins; ties go to the lowest column.
    """
    return choose(score, permitted & usable(score))


@dataclass(frozen=True)
class Columns:
    """One module's N adapters as the scores are computed from them.

    gram [N / 64, F, 64] fp32 and offset [N] fp32 as ``seqr.routing.scores.scores`` takes them.
    """

    gram: torch.Tensor
    offset: torch.Tensor

    @cached_property
    def shift(self) -> torch.Tensor:
        """The offset as [N / 64, 1, 64]; infinite where an adapter cannot be used, whose score is then -inf, no NaN."""
        with torch.inference_mode(False):
            return self.offset.nan_to_num(math.inf).view(-1, 1, COLUMN_BLOCK)


@dataclass(frozen=True)
class Together:
    """The columns of K modules that read the same x and are routed in one call: N and r are the same in all.

    truths: K, or none where the choice need not be exact. Kept by whoever routes more than once: what compiled code
    takes is laid out at the first call.
    """

    columns: Sequence[Columns]
    truths: Sequence[Truth] = ()

    @cached_property
    def grams(self) -> tuple[torch.Tensor, ...]:
        """The gram of each module, [N / 64, F, 64]."""
        return tuple(one.gram for one in self.columns)

    @cached_property
    def shifts(self) -> npt.NDArray[np.float32]:
        """The offsets, on a CPU, for compiled code: fp32 [K, N]."""
        return _rows([one.offset.numpy() for one in self.columns])

    @cached_property
    def arrays(self) -> Arrays:
        """The truths, on a CPU, for compiled code: L, omax, D, A fp64 [K, 4]; the addresses of R int64 [K]; mu, sigma
        fp64 [K, N].
        """
        if not self.truths:
            count = len(self.columns)
            return np.zeros((count, 4)), np.zeros(count, np.int64), np.zeros((count, 0)), np.zeros((count, 0))
        limits, r, mu, sigma = zip(*(truth.arrays for truth in self.truths), strict=True)
        return _rows(limits), np.array([part.ctypes.data for part in r]), _rows(mu), _rows(sigma)


def _rows(parts: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return parts[0][None] if len(parts) == 1 else np.stack(parts)


@dataclass(frozen=True)
class Gate:
    """Who may use what in one batch, laid out once for all its modules: permitted bool [T, N]."""

    permitted: torch.Tensor
    _feature_rows: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def rows(self) -> Flags:
        """``permitted``, on a CPU, for compiled code."""
        return self.permitted.numpy()

    @cached_property
    def somebody(self) -> Flags:
        """bool [T]: the tokens to which anything is permitted."""
        return np.asarray(self.rows.any(1))

    def feature_rows(self, modules: int, rank: int) -> torch.Tensor:
        """Room for the batch's features, fp32 [K, T', F], the rows from T on zero; the same at every call."""
        if (modules, rank) not in self._feature_rows:
            rows = -(-self.permitted.shape[0] // ROW_TILE) * ROW_TILE
            with torch.inference_mode(False):
                self._feature_rows[modules, rank] = torch.zeros(modules, rows, feature_count(rank))
        return self._feature_rows[modules, rank]

    @cached_property
    def uniform(self) -> bool:
        """Whether all tokens may use the same adapters, as when one user is served; they are then kept once."""
        with torch.inference_mode(False):
            return bool((self.permitted == self.permitted[:1]).all())

    @cached_property
    def ceiling(self) -> torch.Tensor:
        """+inf where permitted and -inf elsewhere, fp32 [N / 64, T', 64], T' = T rounded up to a multiple of 16.

        [N / 64, 1, 64] where it is the same for all tokens.
        """
        with torch.inference_mode(False):
            tokens, width = self.permitted.shape
            rows = self.permitted[:1] if self.uniform else F.pad(self.permitted, (0, 0, 0, -tokens % ROW_TILE))
            ceiling = torch.full(rows.shape, -math.inf, device=rows.device).masked_fill_(rows, math.inf)
            return ceiling.view(-1, width // COLUMN_BLOCK, COLUMN_BLOCK).transpose(0, 1).contiguous()

    @cached_property
    def nobody(self) -> torch.Tensor | None:
        """bool [T]: the tokens to which nothing is permitted; None when there are none."""
        with torch.inference_mode(False):
            empty = self.permitted.any(1).logical_not_()
            return empty if bool(empty.any()) else None


def route_activations(z: torch.Tensor, columns: Columns, gate: Gate, truth: Truth | None = None) -> torch.Tensor:
    """``route`` from z fp32 [T, r], in fewer passes over T x N numbers -> int64 [T]. Call inside ``ExactFp32``.

    Without ``truth`` the same columns as ``route(scores(z, ...), gate.permitted)``. With it, the exact choice: the
    argmax of (||R_i z|| - mu_i) / sigma_i in fp64 over the permitted adapters whose fp32 score is a number
    (``seqr.routing.exact``); where fp32 can tell, as for nearly all tokens, that costs a comparison per token.
    """
    if compiled is not None and z.device.type == "cpu":
        return route_together(z[None], Together((columns,), () if truth is None else (truth,)), gate)[0]
    tokens = z.shape[0]
    score = block_product(features(z), columns.gram).clamp_min_(LEAST).sqrt_()
    if gate.uniform:
        score.sub_(torch.maximum(columns.shift, -gate.ceiling))
    else:
        score.sub_(columns.shift).clamp_max_(gate.ceiling)
    rows = score.shape[1]
    # The largest of each block first, which vectorises; then the place in one block of 64 per token.
    peaks = score.amax(2)
    best, block = peaks.max(0)
    row = score.view(-1, COLUMN_BLOCK).index_select(0, torch.add(places(rows, score.device), block, alpha=rows))
    inner = row.max(1).indices
    column = torch.add(inner, block, alpha=COLUMN_BLOCK)
    if rows != tokens:
        column, best = column[:tokens], best[:tokens]
    if gate.nobody is not None:
        column.masked_fill_(gate.nobody, -1)
    if truth is None:
        unclear = _without_number(best, gate)
    else:
        row.scatter_(1, inner[:, None], -math.inf)
        peaks.scatter_(0, block[None], row.amax(1)[None])
        unclear = _in_doubt(doubtful(z, best, peaks.amax(0)[:tokens], truth), gate)
    if unclear is not None:
        token = unclear.nonzero().squeeze(1)
        some = score.index_select(1, token).transpose(0, 1).flatten(1)
        column[token] = _look_again(token, some, z.index_select(0, token), columns, gate, truth)
    return column


def route_together(z: torch.Tensor, modules: Together, gate: Gate) -> torch.Tensor:
    """``route_activations`` of K modules at once: z fp32 [K, T, r], contiguous -> int64 [K, T]."""
    if compiled is None or z.device.type != "cpu":
        truths: Sequence[Truth | None] = modules.truths or [None] * len(modules.columns)
        each = zip(z, modules.columns, truths, strict=True)
        return torch.stack([route_activations(its, columns, gate, truth) for its, columns, truth in each])
    product = compiled.score_product(z, modules.grams, gate.feature_rows(z.shape[0], z.shape[2]))
    column = np.empty(z.shape[:2], np.int64)
    limits, r, mu, sigma = modules.arrays
    compiled.choose_per_token(
        product, modules.shifts, gate.rows, z.numpy(), bool(modules.truths), limits, r, mu, sigma, column
    )
    return torch.from_numpy(column)


def _without_number(best: torch.Tensor, gate: Gate) -> torch.Tensor | None:
    """bool [T] or None: where a NaN or an infinity has come up; whose it was, only the slow way tells."""
    if gate.nobody is not None:
        best = best.masked_fill(gate.nobody, 0.0)
    return None if math.isfinite(float(best.sum())) else best.isfinite().logical_not_()


def _in_doubt(flags: Flags, gate: Gate) -> torch.Tensor | None:
    if gate.nobody is not None:
        flags = flags & ~gate.nobody.cpu().numpy()
    return torch.from_numpy(flags).to(gate.permitted.device) if flags.any() else None


def _look_again(
    token: torch.Tensor, score: torch.Tensor, z: torch.Tensor, columns: Columns, gate: Gate, truth: Truth | None
) -> torch.Tensor:
    """The plain choice of K tokens, or the exact one: token int64 [K], score fp32 [K, N], z [K, r] -> int64 [K]."""
    if not bool((score < math.inf).all()):
        score = scores(z, columns.gram, columns.offset)
        allowed = gate.permitted.index_select(0, token) & usable(score)
        score = score.masked_fill_(allowed.logical_not_(), -math.inf)
    return choose(score, score > -math.inf) if truth is None else settle(z, score, truth)
