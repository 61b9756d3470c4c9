"""From one request's logits to its next token. Nothing here depends on what else is in the batch."""

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import torch

from inference_gateway.engine.base import Sampling, TokenLogprobs

# Below this temperature the likeliest token is taken: dividing by less overflows.
GREEDY_BELOW = 1e-5
# A repetition penalty near 0 may take a logit beyond all numbers; this one can still be divided by a temperature.
LARGEST_LOGIT = 1e300
# How many of the likeliest tokens are sorted first; nearly always they hold all that top_k, min_p and top_p leave.
SORTED_FIRST = 1024


class Matcher(Protocol):
    """A grammar at work. Both raise ``GrammarTooComplex``."""

    def allowed(self) -> torch.Tensor:
        """Which tokens may come next, [V] bool on the CPU; never none."""
        ...

    def accept(self, token: int) -> None:
        """Go on with this token."""
        ...


class Sampler:
    """The pipeline of one request, with its random draws, its grammar and what it has generated so far.

    In this order: log-probabilities of the raw distribution; penalties for repetition (prompt and answer), presence and
    frequency (answer only); ``logit_bias``; the grammar; temperature; ``top_k``; ``min_p``; ``top_p``; the draw.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int] = (), matcher: Matcher | None = None):
        self._sampling = sampling
        self._matcher = matcher
        self._repeated = set(prompt) if sampling.repetition_penalty != 1.0 else set()
        self._biased = torch.tensor([token for token, _ in sampling.logit_bias], dtype=torch.long)
        self._bias = torch.tensor([addend for _, addend in sampling.logit_bias], dtype=torch.float64)
        self._counts: Counter[int] = Counter()
        self._logprobs: list[TokenLogprobs] = []
        self._generator = torch.Generator(device="cpu")
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def next(self, logits: torch.Tensor) -> int:
        """The next token for logits [V] fp32, which stay as they are. Raises ``GrammarTooComplex``."""
        row = logits.detach().to("cpu", torch.float64, copy=True)
        raw = row.clone() if self._sampling.logprobs is not None else None
        self._adjust(row)
        greedy = self._sampling.temperature < GREEDY_BELOW
        token = int(row.argmax()) if greedy else self._draw(row / self._sampling.temperature)
        if raw is not None:
            self._logprobs.append(logprobs_of(raw, token, self._sampling.logprobs or 0))
        self._counts[token] += 1
        if self._matcher is not None:
            self._matcher.accept(token)
        return token

    def take(self, count: int) -> tuple[TokenLogprobs, ...]:
        """The log-probabilities of the oldest ``count`` tokens not yet taken; empty when they were not asked for."""
        taken, self._logprobs = self._logprobs[:count], self._logprobs[count:]
        return tuple(taken)

    def _adjust(self, row: torch.Tensor) -> None:
        """Penalties, bias and grammar, in place."""
        asked = self._sampling
        if asked.repetition_penalty != 1.0:
            seen = torch.tensor(sorted(self._repeated.union(self._counts)), dtype=torch.long)
            values = row[seen]
            scaled = torch.where(values > 0, values / asked.repetition_penalty, values * asked.repetition_penalty)
            row[seen] = scaled.clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
        if self._counts and (asked.presence_penalty or asked.frequency_penalty):
            ids = torch.tensor(list(self._counts), dtype=torch.long)
            times = torch.tensor(list(self._counts.values()), dtype=row.dtype)
            row[ids] -= asked.presence_penalty + asked.frequency_penalty * times
        if asked.logit_bias:
            row.index_add_(0, self._biased, self._bias)
        if self._matcher is not None:
            row.masked_fill_(~self._matcher.allowed(), -float("inf"))

    def _draw(self, scaled: torch.Tensor) -> int:
        """A token drawn from what ``top_k``, ``min_p`` and ``top_p`` leave of softmax(scaled)."""
        weights = (scaled - scaled.max()).exp()
        order = None
        if self._sampling.top_k or self._sampling.min_p > 0 or self._sampling.top_p < 1.0:
            weights, order = self._cut(weights)
        mass = weights.cumsum(0)
        reach = torch.rand((), generator=self._generator, dtype=torch.float64) * mass[-1]
        # The first place where the mass passes `reach`; rounding may leave none, and then the last of any mass.
        index = min(int(torch.searchsorted(mass, reach, right=True)), int(weights.nonzero()[-1]))
        return index if order is None else int(order[index])

    def _cut(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The largest weights that stay, largest first, and their tokens. The largest of all always stays."""
        asked, total = self._sampling, float(weights.sum())
        limit = asked.top_k or len(weights)
        first, tokens = weights.topk(min(len(weights), SORTED_FIRST))
        # Enough when the cut falls inside: by number, by size, or (where all tokens count) by mass.
        enough = (
            len(first) == len(weights)
            or limit <= len(first)
            or bool(first[-1] < asked.min_p * first[0])
            or (not asked.top_k and asked.min_p == 0 and float(first.sum()) >= asked.top_p * total)
        )
        if not enough:
            first, tokens = weights.sort(descending=True, stable=True)
        kept = first[:limit]
        kept = kept[kept >= asked.min_p * kept[0]]
        if asked.top_p < 1.0:
            # The mass is that of the tokens that top_k and min_p have left.
            whole = total if limit >= len(weights) and asked.min_p == 0 else float(kept.sum())
            before = kept.cumsum(0) - kept
            kept = kept[: max(1, int((before < asked.top_p * whole).sum()))]
        return kept, tokens[: len(kept)]


def logprobs_of(logits: torch.Tensor, token: int, count: int) -> TokenLogprobs:
    """ln p of ``token``, and the ``count`` likeliest tokens with theirs, under softmax(logits), logits [V]."""
    whole = torch.logsumexp(logits, 0)
    values, ids = logits.topk(min(count, len(logits)))
    pairs = zip(ids.tolist(), (values - whole).tolist(), strict=True)
    return TokenLogprobs(float(logits[token] - whole), tuple(pairs))


def sampler_of(sampling: Sampling, prompt: Sequence[int], matcher: Matcher | None = None) -> Sampler | None:
    """What a request needs beyond the argmax of its logits; None for plain greedy decoding."""
    asks = (
        sampling.temperature >= GREEDY_BELOW
        or sampling.logprobs is not None
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.repetition_penalty != 1.0
        or sampling.logit_bias
        or matcher is not None
    )
    return Sampler(sampling, prompt, matcher) if asks else None
