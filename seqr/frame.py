"""What a conversation's prompt holds that is the same in every conversation, and so says nothing about any of them.

A chat template puts tokens before the user's first word and after the last. They are no evidence (decision 7),
and calibration on public text leaves them out as well: statistics and evidence are of the same kind of token.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Frame:
    """The silent positions of one prompt: those below ``head``, at least the first, and those in ``tail``."""

    head: int = 1
    tail: range = range(0)

    def speaks(self, position: int) -> bool:
        """Whether the token at ``position`` counts as evidence."""
        return position >= max(1, self.head) and position not in self.tail

    def spoken(self, end: int) -> int:
        """How many of the positions below ``end`` count as evidence."""
        head = max(1, self.head)
        silent = len(range(max(head, self.tail.start), min(end, self.tail.stop)))
        return max(0, end - head) - silent


# A prompt without a chat around it: only position 0 is silent.
NO_FRAME = Frame()


@dataclass(frozen=True)
class ChatFrame:
    """The tokens that every conversation of a model begins with, and those that every prompt ends with."""

    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()

    def of(self, prompt: Sequence[int]) -> Frame:
        """The part of the frame that ``prompt`` has: one with a system message of its own shares less of the prefix."""
        head = common_prefix(self.prefix, prompt)
        tail = common_prefix(self.suffix[::-1], prompt[::-1])
        return Frame(max(1, head), range(max(head, len(prompt) - tail), len(prompt)))


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences share from their beginning."""
    shared = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        shared += 1
    return shared
