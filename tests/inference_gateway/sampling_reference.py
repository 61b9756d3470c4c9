"""The next token's distribution in plain, slow Python: what ``engine.sampling`` is compared with."""

import math
from collections.abc import Sequence

from inference_gateway.engine.base import Sampling


def adjusted(logits: Sequence[float], asked: Sampling, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
    """Logits after penalties and bias."""
    out = list(logits)
    for token in range(len(out)):
        if asked.repetition_penalty != 1 and token in {*prompt, *answer}:
            out[token] *= asked.repetition_penalty if out[token] <= 0 else 1 / asked.repetition_penalty
        if token in answer:
            out[token] -= asked.presence_penalty + asked.frequency_penalty * list(answer).count(token)
    for token, addend in asked.logit_bias:
        out[token] += addend
    return out


def softmax(logits: Sequence[float]) -> list[float]:
    weights = [math.exp(one - max(logits)) for one in logits]
    return [one / sum(weights) for one in weights]


def distribution(
    logits: Sequence[float],
    asked: Sampling,
    prompt: Sequence[int] = (),
    answer: Sequence[int] = (),
    allowed: Sequence[bool] | None = None,
) -> dict[int, float]:
    """The probability of every token that may be drawn."""  # fmt: skip
    scores = adjusted(logits, asked, prompt, answer)
    if allowed is not None:
        scores = [one if ok else -math.inf for one, ok in zip(scores, allowed, strict=True)]
    if asked.temperature == 0:
        return {scores.index(max(scores)): 1.0}
    weights = dict(enumerate(softmax([one / asked.temperature for one in scores])))
    if asked.top_k:
        weights = dict(sorted(weights.items(), key=lambda one: -one[1])[: asked.top_k])
    weights = {token: one for token, one in weights.items() if one >= asked.min_p * max(weights.values())}
    total, kept, mass = sum(weights.values()), {}, 0.0
    for token, one in sorted(weights.items(), key=lambda one: -one[1]):
        if kept and mass >= asked.top_p * total:
            break
        kept[token] = one
        mass += one
    return {token: one / mass for token, one in kept.items() if one > 0}
