"""Which adapter a whole prompt speaks for, by any variant of accumulated evidence, from stored norms.

The product's rule is the default variant: the mean over modules and words of (norm - mu) / sigma, mu and sigma from
public text, clipped to [-6, 6], a word counting half as much as the one 6 places after it;
``seqr.routers.evidence.PromptEvidenceRouter`` is the same in the forward pass.
"""

from dataclasses import dataclass

import torch

from seqr.bench.paper.reading import Norms
from seqr.routers.statistics import Statistics
from seqr.routing.evidence import HALF_LIFE
from seqr.routing.scores import CLIP


@dataclass(frozen=True)
class Variant:
    """One rule.

    statistic: "norm" (||R z||), "log" (its logarithm), "relative" (||R z|| / ||z||); robust: median and MAD instead of
    mean and deviation; clip: bound of a score, None for none; sites: "all", or every how many-th module or which third
    of them counts; per_sequence: the deviation is that of a text's mean instead of a token's; texts: how many of the
    public texts calibrate; words: "all", or "first 8", "without first 4", "without last 8" of a prompt's tokens, or
    "half-life 4": a word counts half as much as the word 4 places after it.
    """

    statistic: str = "norm"
    robust: bool = False
    clip: float | None = CLIP
    sites: str = "all"
    per_sequence: bool = False
    texts: int | None = None
    words: str = f"half-life {HALF_LIFE}"

    def values(self, norms: Norms, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """The statistic of every token, module and adapter: [T, M, N]."""
        wide = norms.norms.to(dtype)
        if self.statistic == "log":
            return wide.clamp_min(1e-30).log()
        if self.statistic == "relative":
            return wide / norms.size.to(dtype).clamp_min(1e-30)[:, :, None]
        return wide

    def modules(self, count: int) -> torch.Tensor:
        """The modules that count: int64."""
        index = torch.arange(count)
        if self.sites == "all":
            return index
        thirds = {"first third": 0, "middle third": 1, "last third": 2}
        if self.sites in thirds:
            return index.chunk(3)[thirds[self.sites]]
        return index[:: int(self.sites.split()[1])]  # "every 4"

    def weights(self, row: torch.Tensor) -> torch.Tensor:
        """fp64 [T]: how much each token counts, row int64 [T] being their sequences in order."""
        if self.words == "all":
            return torch.ones_like(row, dtype=torch.float64)
        *negated, end, number = self.words.split()
        lengths = torch.bincount(row)
        place = torch.arange(len(row)) - (lengths.cumsum(0) - lengths)[row]
        from_end = lengths[row] - 1 - place
        if end == "half-life":
            return torch.exp2(from_end.double() / -float(number))
        chosen = (place if end == "first" else from_end) < int(number)
        return (~chosen if negated else chosen).double()

    def calibrated(self, public: Norms) -> Statistics:
        """mu and sigma of the statistic on the public text, fp64 [M, N]."""
        row = public.row
        keep = torch.ones_like(row, dtype=torch.bool) if self.texts is None else row < self.texts
        values = self.values(Norms(public.norms[keep], row[keep], public.size[keep]))
        if self.per_sequence:
            values = row_means(values, row[keep])
        if self.robust:
            middle = values.median(0).values
            return Statistics(middle, 1.4826 * (values - middle).abs().median(0).values)
        return Statistics(values.mean(0), values.std(0, correction=0))


def evidence(
    norms: Norms, statistics: Statistics, variant: Variant | None = None, rows: int | None = None
) -> torch.Tensor:
    """The evidence of every prompt for every adapter: fp64 [S, N], the mean score over its words and the sites."""
    variant = variant or Variant()
    mu, sigma = statistics.mu.to(torch.float32), statistics.sigma.to(torch.float32)
    score = variant.values(norms, torch.float32).sub(mu).div_(sigma).nan_to_num_(-1e9, 1e9, -1e9)
    if variant.clip is not None:
        score = score.clamp_(-variant.clip, variant.clip)
    of_token = score[:, variant.modules(score.shape[1])].mean(1, dtype=torch.float64)
    return row_means(of_token, norms.row, variant.weights(norms.row), rows)


def row_means(
    values: torch.Tensor, row: torch.Tensor, weights: torch.Tensor | None = None, rows: int | None = None
) -> torch.Tensor:
    """The (weighted) mean over each sequence's tokens: values [T, ...], row and weights [T] -> [S, ...]; 0 for none."""
    count = int(row.max()) + 1 if rows is None else rows
    weights = (torch.ones_like(row) if weights is None else weights).to(values.dtype)
    column = (-1, *[1] * (values.dim() - 1))
    total = values.new_zeros(count, *values.shape[1:]).index_add_(0, row, values * weights.view(column))
    words = values.new_zeros(count).index_add_(0, row, weights)
    return total / torch.where(words > 0, words, 1.0).view(column)


def chosen(value: torch.Tensor, forbidden: int | None = None, threshold: float | None = None) -> list[int]:
    """The adapter of most evidence per prompt; -1 where none reaches ``threshold``: value [S, N]."""
    if forbidden is not None:
        value = value.clone()
        value[:, forbidden] = -torch.inf
    best, column = value.max(1)
    if threshold is not None:
        column = column.masked_fill(best <= threshold, -1)
    columns: list[int] = column.tolist()
    return columns


# Rules by which a whole prompt decides: the product's; with all words alike; and over the first third of the modules,
# where tasks are told apart best.
RULES: dict[str, Variant] = {
    "prompt_evidence": Variant(),
    "even_evidence": Variant(words="all"),
    "early_evidence": Variant(words="all", sites="first third"),
}

ABLATIONS: dict[str, Variant] = {
    "the product's rule": Variant(),
    "all words alike": Variant(words="all"),
    "half-life of 2 words": Variant(words="half-life 2"),
    "half-life of 4 words": Variant(words="half-life 4"),
    "half-life of 8 words": Variant(words="half-life 8"),
    "half-life of 16 words": Variant(words="half-life 16"),
    "only a prompt's last 8 words": Variant(words="last 8"),
    "all alike without its last 8": Variant(words="without last 8"),
    "only its first 8": Variant(words="first 8"),
    "only its first 16": Variant(words="first 16"),
    "clip 1": Variant(clip=1.0),
    "clip 2": Variant(clip=2.0),
    "clip 3": Variant(clip=3.0),
    "clip 12": Variant(clip=12.0),
    "no clip": Variant(clip=None),
    "log of the norm": Variant(statistic="log"),
    "norm relative to that of z": Variant(statistic="relative"),
    "median and MAD": Variant(robust=True),
    "deviation of a text's mean": Variant(per_sequence=True),
    "deviation of a text's mean, no clip": Variant(per_sequence=True, clip=None),
    "120 public texts": Variant(texts=120),
    "60 public texts": Variant(texts=60),
    "20 public texts": Variant(texts=20),
    "every 2nd module": Variant(sites="every 2"),
    "every 4th module": Variant(sites="every 4"),
    "every 16th module": Variant(sites="every 16"),
    "first third of the modules": Variant(sites="first third"),
    "middle third of the modules": Variant(sites="middle third"),
    "last third of the modules": Variant(sites="last third"),
}
