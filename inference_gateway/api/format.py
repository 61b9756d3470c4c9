"""How a route writes its answers, whole and as the events of a stream. A route's own class says what a choice is."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from inference_gateway.api import attribution
from inference_gateway.api.answering import Piece, ShownToken
from inference_gateway.api.asking import Asked


class Format(ABC):
    """For one request. ``kinds``: what its body and what its events call themselves; ``prefix``: how its id begins."""

    def __init__(self, asked: Asked, kinds: tuple[str, str], prefix: str):
        self.asked = asked
        self._kinds = kinds
        self._id = f"{prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def whole(self, answers: Sequence[tuple[Sequence[ShownToken], Piece]]) -> Mapping[str, Any]:
        """The body with all choices: for each its tokens and its last piece."""
        ends = [end for _, end in answers]
        choices = [self.choice(tokens, end) for tokens, end in answers]
        return {**self._head(self._kinds[0]), "choices": choices, "usage": self.usage(ends), **self.closing(ends)}

    def event(self, *choices: Mapping[str, Any]) -> dict[str, Any]:
        """The body of an event."""
        return {**self._head(self._kinds[1]), "choices": list(choices)}

    @abstractmethod
    def choice(self, tokens: Sequence[ShownToken], end: Piece) -> Mapping[str, Any]:
        """A whole choice."""

    @abstractmethod
    def opening(self) -> Iterable[Mapping[str, Any]]:
        """The choices that open a stream, one event each."""

    @abstractmethod
    def parts(self, piece: Piece) -> Iterable[Mapping[str, Any]]:
        """The choices that a piece becomes, one event each; the last of a choice has its finish_reason."""

    def closing(self, ends: Sequence[Piece]) -> Mapping[str, Any]:
        """Who shaped the answers, when asked for; with the last pieces of all choices."""
        return attribution.summary(self.asked, (end.shares for end in ends))

    def usage(self, ends: Sequence[Piece]) -> Mapping[str, int]:
        """Tokens of the prompts, each counted once, and of all choices."""
        prompts, used = self.asked.prompt_tokens, sum(piece.used for piece in ends)
        return {"prompt_tokens": prompts, "completion_tokens": used, "total_tokens": prompts + used}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self.asked.model}
