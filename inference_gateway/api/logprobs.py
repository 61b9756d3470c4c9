"""Log-probabilities in OpenAI's two forms. A token's own text is told, which need not be whole characters."""

from collections.abc import Sequence
from typing import Any, Protocol

from inference_gateway.api.answering import ShownToken

# JSON has no infinity; this is what OpenAI's interface says for a probability of zero.
LEAST = -9999.0


class TokenBytes(Protocol):
    """Knows the bytes of a token's text."""

    def token_bytes(self, token: int) -> bytes: ...


def of_chat(vocabulary: TokenBytes, tokens: Sequence[ShownToken]) -> dict[str, Any]:
    """``logprobs`` of a chat choice."""
    return {"content": [_of_chat_token(vocabulary, token) for token in tokens], "refusal": None}


def _of_chat_token(vocabulary: TokenBytes, token: ShownToken) -> dict[str, Any]:
    known = token.logprobs
    top = () if known is None else known.top
    return {
        **_entry(vocabulary, token.id, LEAST if known is None else known.logprob),
        "top_logprobs": [_entry(vocabulary, one, logprob) for one, logprob in top],
    }


def _entry(vocabulary: TokenBytes, token: int, logprob: float) -> dict[str, Any]:
    data = vocabulary.token_bytes(token)
    return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, LEAST), "bytes": list(data)}


def of_completion(vocabulary: TokenBytes, tokens: Sequence[ShownToken], offset: int) -> dict[str, Any]:
    """``logprobs`` of a completion's choice whose text so far has ``offset`` characters."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    known = [token.logprobs for token in tokens]
    return {
        "text_offset": offsets,
        "tokens": [_text(vocabulary, token.id) for token in tokens],
        "token_logprobs": [None if one is None else max(one.logprob, LEAST) for one in known],
        "top_logprobs": [None if one is None else _alternatives(vocabulary, one.top) for one in known],
    }


def _alternatives(vocabulary: TokenBytes, top: Sequence[tuple[int, float]]) -> dict[str, float]:
    named: dict[str, float] = {}
    for token, logprob in top:  # of tokens with the same text the likeliest
        named.setdefault(_text(vocabulary, token), max(logprob, LEAST))
    return named


def _text(vocabulary: TokenBytes, token: int) -> str:
    return vocabulary.token_bytes(token).decode("utf-8", "replace")
