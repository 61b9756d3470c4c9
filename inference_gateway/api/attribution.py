"""Which silo shaped what, when a request asks for it. Only silos that the caller may use exist here."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from inference_gateway.api.answering import ShownToken
from inference_gateway.api.asking import Asked
from inference_gateway.engine.base import Shares


def summary(asked: Asked, ends: Iterable[Shares | None]) -> dict[str, Any]:
    """``seqr`` of a whole answer: shares of all (token, module) choices, and of those that made answer tokens."""
    if not asked.request.attribution:
        return {}
    known = [shares for shares in ends if shares is not None]
    total: Counter[str] = Counter()
    answer: Counter[str] = Counter()
    for shares in known:
        total.update(shares.total)
        answer.update(shares.answer)
    return {
        "seqr": {
            "permitted": list(asked.silos),
            "routing": asked.request.mode,
            "policy_version": asked.decision.policy_version,
            "library_version": asked.library_version,
            "shares": _shares(total, sum(one.choices for one in known)),
            "answer_shares": _shares(answer, sum(one.answer_choices for one in known)),
        }
    }


def of_tokens(asked: Asked, tokens: Sequence[ShownToken]) -> dict[str, Any]:
    """``seqr`` of a choice: per token its part of the text, the silo with the largest share, all shares, the margin.

    ``silo`` is null where the base model alone shaped the token. The texts together are the answer's.
    """
    if not asked.request.attribution:
        return {}
    return {"seqr": {"tokens": [_of_token(token) for token in tokens]}}


def _of_token(token: ShownToken) -> dict[str, Any]:
    shares: dict[str, float] = {}
    if token.shares is not None:
        shares = _shares(token.shares.counts, token.shares.choices)
    return {
        "token": token.text,
        "id": token.id,
        "silo": min(shares, key=lambda silo: (-shares[silo], silo.encode()), default=None),
        "shares": shares,
        "margin": None if token.shares is None or token.shares.margin is None else round(token.shares.margin, 6),
    }


def _shares(counts: Mapping[str, int], choices: int) -> dict[str, float]:
    return {silo: round(count / choices, 6) for silo, count in sorted(counts.items()) if count} if choices else {}
