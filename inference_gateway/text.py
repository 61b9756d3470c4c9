"""From tokens to text, piece by piece: no half characters, and nothing from a stop string on."""

from collections.abc import Sequence
from typing import Any

# A byte-level tokenizer may need this many tokens for one character; after that the bytes are simply not UTF-8.
_LONGEST_CHARACTER = 8
_REPLACEMENT = "\ufffd"


class TextStream:
    """The text of one answer as it grows. ``stopped`` once a stop string has appeared; it is not part of the text.

    Text comes out token by token and in order: each piece belongs to the next token whose piece had not come out. Of
    a character made of several tokens the last one has it all and the others have nothing. A token whose text begins
    in a stop string never comes out.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._done = 0  # tokens whose text is out of the tokenizer
        self._context = 0  # from where to decode again, for tokenizers whose words depend on what comes before
        self._held: list[str] = []  # texts of tokens that may hold the beginning of a stop string
        self.stopped = False

    def push(self, ids: Sequence[int]) -> list[str]:
        """Take in tokens; returns the pieces that are certain now."""
        pieces: list[str] = []
        for token in ids:
            if self.stopped:
                break
            self._ids.append(token)
            pieces += self._release(self._decode(), final=False)
        return pieces

    def finish(self) -> list[str]:
        """What was held back, when no token follows."""
        if self.stopped:
            return []
        return self._release(self._advance(len(self._ids), self._text(self._context, len(self._ids))), final=True)

    def _decode(self) -> list[str]:
        """The texts of the tokens up to the last whole character; the rest waits for more tokens."""
        end = len(self._ids)
        text = self._text(self._context, end)
        if text.endswith(_REPLACEMENT) and end - self._done < _LONGEST_CHARACTER:
            return []
        return self._advance(end, text)

    def _advance(self, end: int, text: str) -> list[str]:
        known = self._text(self._context, self._done)
        waiting = end - self._done
        self._context, self._done = self._done, end
        return [*[""] * (waiting - 1), text[len(known) :]] if waiting else []

    def _text(self, start: int, end: int) -> str:
        return str(self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True))

    def _release(self, fresh: list[str], final: bool) -> list[str]:
        self._held += fresh
        text = "".join(self._held)
        found = [at for at in (text.find(word) for word in self._stop) if at >= 0]
        if found:
            self.stopped = True
            return self._cut(min(found))
        keep = 0 if final else max((beginning(text, word) for word in self._stop), default=0)
        sure, count, length = len(text) - keep, 0, 0
        while count < len(self._held) and length + len(self._held[count]) <= sure:
            length += len(self._held[count])
            count += 1
        released, self._held = self._held[:count], self._held[count:]
        return released

    def _cut(self, end: int) -> list[str]:
        """The pieces of the first ``end`` held characters."""
        pieces, length = [], 0
        for piece in self._held:
            if length >= end:
                break
            pieces.append(piece[: end - length])
            length += len(piece)
        self._held = []
        return pieces


def beginning(text: str, word: str) -> int:
    """The length of the longest end of ``text`` with which ``word`` begins, short of all of it."""
    return next((n for n in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:n])), 0)
