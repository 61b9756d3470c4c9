"""The exact choice among very many adapters without scoring each: leaves of alike adapters, and a bound for each leaf.

A leaf is eight adapters whose quadratic forms G_i = R_i^T R_i / sigma_i^2 are close. In the order of symmetric matrices

    G_i <= U   for all i of the leaf, hence      score_i(z) <= sqrt(z^T U z) - min o_i

(A + B + |A - B|) / 2, with |.| the root of the square, is an upper bound of two forms A and B that no other one is
below, one in each system of coordinates; it is taken where a sample of tokens z is white, because only directions that
occur cost anything, and pair by pair up to the leaf. A bound has the form of a score, so all leaves' bounds are one
product of N / 8 columns. Then, for each token: score the leaves of largest bound, and every other leaf whose bound
reaches the best score found; decide among what is left as ``seqr.routing.exact`` does, in fp64.

Rounding: U is raised by c I with the c of ``exact`` for U itself, and a leaf is left out only when its bound, with its
rounding, is below every score that could still win (``exact.margin``). So the answer is always the full product's.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from seqr.routing.exact import TINY, UNIT, Truth, margin, settle_pairs
from seqr.routing.features import feature_count, features, packed
from seqr.routing.optional import compiled
from seqr.routing.scores import LEAST, places

LEAF = 8
_FIRST = 4
_AT_ONCE = 1 << 12
_LEAVES_AT_ONCE = 1 << 9


@dataclass(frozen=True)
class SearchIndex:
    """N usable adapters in B leaves of 8.

    bound fp32 [F, B] and reach fp32 [B], min o: the leaves' bounds; gram fp32 [B, F, 8], offset fp32 [B, 8] and column
    int64 [B, 8]: the members (a leaf that is not full repeats one of its own).
    """

    bound: torch.Tensor
    reach: torch.Tensor
    gram: torch.Tensor
    offset: torch.Tensor
    column: torch.Tensor
    truth: Truth

    @classmethod
    def build(cls, truth: Truth, usable: torch.Tensor, sample: torch.Tensor) -> "SearchIndex":
        """Of one module's adapters; usable bool [N]; sample fp32 [S, r]: tokens z such as will be routed, S >> r."""
        white = _whitening(sample)
        members = usable.nonzero().squeeze(1)
        if members.shape[0] == 0:
            # Column 0, which nobody is permitted: an index of nobody needs no case of its own.
            members = members.new_zeros(1)
        leaves = members[_leaves(_embedding(truth, members, sample), LEAF)]
        form = _forms(truth, leaves.flatten())
        offset = (truth.mu / truth.sigma)[leaves]
        upper = torch.cat(
            [_upper(g, white) for g in torch.split(form.view(*leaves.shape, *form.shape[1:]), _LEAVES_AT_ONCE)]
        )
        count = feature_count(form.shape[1])
        size = upper.abs()
        largest = torch.minimum(torch.linalg.matrix_norm(size), size.sum(2).amax(1))
        raised = (count + 4) * UNIT * largest * (1.0 + 1e-6) + count * TINY
        upper.diagonal(dim1=1, dim2=2).add_(raised[:, None] * (1.0 + 1e-6))
        return cls(
            packed(upper).T.to(torch.float32).contiguous(),
            offset.amin(1).to(torch.float32),
            packed(form).to(torch.float32).view(*leaves.shape, count).transpose(1, 2).contiguous(),
            offset.to(torch.float32),
            leaves,
            truth,
        )

    def allow(self, permitted: torch.Tensor) -> "Allowed":
        """permitted bool [T, N], once for every batch of users."""
        member = permitted[:, self.column.flatten()].view(-1, *self.column.shape)
        return Allowed(member, torch.where(member.any(2), math.inf, -math.inf))

    def bounds(self, z: torch.Tensor) -> torch.Tensor:
        """fp32 [T, B]: no usable adapter of leaf b has a true score above this; z fp32 [T, r]."""
        bound = (features(z) @ self.bound).add_(2.0 * self.truth.worst_floor).clamp_min_(LEAST).sqrt_().sub_(self.reach)
        return bound.add_(bound.abs(), alpha=4.0 * UNIT).add_(8.0 * UNIT * self.truth.widest)

    def route(self, z: torch.Tensor, allowed: "Allowed") -> torch.Tensor:
        """The exact choice: z fp32 [T, r] -> int64 [T], or -1 where nothing is permitted. Call inside ``ExactFp32``.

        A token so large that fp32 has no number for a bound gets nobody.
        """
        if compiled is not None and z.device.type == "cpu":
            return self._route_compiled(z, allowed)
        bound = self.bounds(z).clamp_max_(allowed.ceiling).nan_to_num_(-math.inf, -math.inf, -math.inf)
        leaf = bound.topk(min(_FIRST, bound.shape[1]), dim=1).indices
        token = places(z.shape[0], z.device)[:, None].expand_as(leaf).flatten()
        found = self._scores(z, token, leaf.flatten(), allowed).view(z.shape[0], -1).amax(1)
        least = found - margin(z, found, self.truth)
        token, leaf = (bound >= least.nan_to_num_(math.inf)[:, None]).nonzero(as_tuple=True)
        score = self._scores(z, token, leaf, allowed)
        found = found.scatter_reduce(0, token, score.amax(1), "amax")
        least = (found - margin(z, found, self.truth)).nan_to_num_(math.inf)
        pair, member = (score >= least[token][:, None]).nonzero(as_tuple=True)
        return settle_pairs(z, score[pair, member], token[pair], self.column[leaf[pair], member], self.truth)

    def _route_compiled(self, z: torch.Tensor, allowed: "Allowed") -> torch.Tensor:
        of_z, column = features(z), np.empty(z.shape[0], np.int64)
        product = (of_z @ self.bound).numpy()
        gram, offset, columns = self.gram.numpy(), self.offset.numpy(), self.column.numpy()
        limits, r, mu, sigma = self.truth.arrays
        compiled.search_leaves(
            product, self.reach.numpy(), allowed.ceiling.numpy(), of_z.numpy(), gram, offset, allowed.member.numpy(),
            columns, z.numpy(), limits, r, mu, sigma, column,
        )  # fmt: skip
        return torch.from_numpy(column)

    def _scores(self, z: torch.Tensor, token: torch.Tensor, leaf: torch.Tensor, allowed: "Allowed") -> torch.Tensor:
        """fp32 [P, 8]: the scores of the members of ``leaf`` for ``token``, which ascends; -inf for the forbidden."""
        of_z, counts = features(z), torch.bincount(token, minlength=z.shape[0]).tolist()
        q = [f @ self.gram.index_select(0, some) for some, f in zip(torch.split(leaf, counts), of_z, strict=True)]
        score = torch.cat(q).clamp_min_(LEAST).sqrt_().sub_(self.offset.index_select(0, leaf))
        return score.masked_fill_(allowed.member[token, leaf].logical_not_(), -math.inf)


@dataclass(frozen=True)
class Allowed:
    """Permissions in an index's order: member bool [T, B, 8]; ceiling fp32 [T, B], -inf where a leaf has none."""

    member: torch.Tensor
    ceiling: torch.Tensor


def _forms(truth: Truth, columns: torch.Tensor) -> torch.Tensor:
    """G = R^T R / sigma^2, fp64 [K, r, r]."""
    r = truth.r[columns].to(torch.float64) / truth.sigma[columns][:, None, None]
    return r.transpose(1, 2) @ r


def _whitening(sample: torch.Tensor) -> torch.Tensor:
    """W fp64 [r, r] with W W^T the second moment of the sample, a millionth of its trace added: z = W (white)."""
    wide = sample.to(torch.float64)
    moment = wide.T @ wide / wide.shape[0]
    moment.diagonal().add_(1e-6 * moment.trace() / moment.shape[0] + TINY)
    white: torch.Tensor = torch.linalg.cholesky(moment)
    return white


def _embedding(truth: Truth, members: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """fp32 [K, S']: what each member scores on some of the sample. Members that are close here belong together."""
    some = sample[:: max(1, sample.shape[0] // 64)]
    of_sample = features(some.to(torch.float64)).T
    scores = [
        (packed(_forms(truth, part)) @ of_sample).clamp_min_(0.0).sqrt_() - (truth.mu / truth.sigma)[part][:, None]
        for part in torch.split(members, _AT_ONCE)
    ]
    return torch.cat(scores).to(torch.float32)


def _leaves(points: torch.Tensor, size: int) -> torch.Tensor:
    """int64 [B, size]: the points halved again and again across their widest direction."""
    generator = torch.Generator().manual_seed(0)
    stack, leaves = [torch.arange(points.shape[0])], []
    while stack:
        part = stack.pop()
        if part.shape[0] <= size:
            leaves.append(torch.cat([part, part[:1].expand(size - part.shape[0])]))
            continue
        centred = points[part] - points[part].mean(0)
        direction = torch.randn(points.shape[1], generator=generator)
        for _ in range(4):
            direction = centred.T @ (centred @ direction)
            direction /= direction.norm() + TINY
        order = (centred @ direction).argsort()
        half = -(-part.shape[0] // (2 * size)) * size
        stack += [part[order[:half]], part[order[half:]]]
    return torch.stack(leaves)


def _upper(form: torch.Tensor, white: torch.Tensor) -> torch.Tensor:
    """U of each leaf, fp64 [B, r, r]: form [B, 8, r, r], white [r, r]."""
    bound = white.T @ form @ white
    while bound.shape[1] > 1:
        one, other = bound[:, 0::2], bound[:, 1::2]
        values, vectors = torch.linalg.eigh(one - other)
        apart = (vectors * values.abs()[..., None, :]) @ vectors.transpose(2, 3)
        bound = (one + other + apart) / 2
    back: torch.Tensor = torch.linalg.inv(white)
    upper: torch.Tensor = back.T @ bound[:, 0] @ back
    return upper
