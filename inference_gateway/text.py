"""From tokens to text, piece by piece: no half characters, and nothing from a stop string on."""

from collections.abc import Sequence
from typing import Any

# A byte-level tokenizer may need this many tokens for one character; after that the bytes are simply not UTF-8.
_LONGEST_CHARACTER = 8
_REPLACEMENT = "\ufffd"


class TextStream:
    """The text of one answer as it grows. ``stopped`` once a stop string has appeared; it is not part of the text."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._done = 0  # tokens whose text is out of the tokenizer
        self._context = 0  # from where to decode again, for tokenizers whose words depend on what comes before
        self._held = ""  # text that may be the beginning of a stop string
        self.stopped = False

    def push(self, ids: Sequence[int]) -> str:
        """Take in tokens; returns the text that is certain now."""
        if self.stopped:
            return ""
        self._ids.extend(ids)
        return self._release(self._decode(), final=False)

    def finish(self) -> str:
        """What was held back, when no token follows."""
        if self.stopped:
            return ""
        text = self._text(self._context, len(self._ids))[len(self._text(self._context, self._done)) :]
        return self._release(text, final=True)

    def _decode(self) -> str:
        """The text of the tokens up to the last whole character; the rest waits for more tokens."""
        end = len(self._ids)
        for whole in range(end, max(self._done, end - _LONGEST_CHARACTER), -1):
            text = self._text(self._context, whole)
            if not text.endswith(_REPLACEMENT):
                return self._advance(whole, text)
        if end - self._done < _LONGEST_CHARACTER:
            return ""
        return self._advance(end, self._text(self._context, end))

    def _advance(self, end: int, text: str) -> str:
        known = self._text(self._context, self._done)
        self._context, self._done = self._done, end
        return text[len(known) :]

    def _text(self, start: int, end: int) -> str:
        return str(self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True))

    def _release(self, fresh: str, final: bool) -> str:
        text = self._held + fresh
        found = [at for at in (text.find(word) for word in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if final else max((_overlap(text, word) for word in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, word: str) -> int:
    """The length of the longest end of ``text`` with which ``word`` begins."""
    return next((n for n in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:n])), 0)
