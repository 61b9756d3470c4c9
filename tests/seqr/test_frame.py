"""What is the same in every conversation says nothing about any of them."""

import pytest

from seqr.frame import ChatFrame, Frame, common_prefix

CHAT = ChatFrame((1, 2, 3), (8, 9))


def spoken(frame: Frame, length: int) -> list[int]:
    return [position for position in range(length) if frame.speaks(position)]


@pytest.mark.parametrize(
    ("prompt", "positions"),
    [
        ([1, 2, 3, 5, 6, 8, 9], [3, 4]),
        ([1, 2, 7, 5, 6, 8, 9], [2, 3, 4]),  # a system message of its own: less of the frame
        ([1, 2, 3, 5, 6, 7], [3, 4, 5]),  # no end of the frame
        ([1, 2, 3, 5, 9], [3]),  # half of the end
        ([5, 6], [1]),  # nothing of the frame; position 0 never counts
        ([1, 2, 3, 8, 9], []),  # an empty message
        ([1, 2, 3], []),
        ([8, 9], []),
        ([], []),
    ],
)
def test_the_words_between_the_frames_ends_speak(prompt: list[int], positions: list[int]) -> None:
    assert spoken(CHAT.of(prompt), len(prompt)) == positions


def test_prefix_and_suffix_never_count_a_token_twice() -> None:
    frame = ChatFrame((4, 4), (4, 4)).of([4, 4, 4])
    assert (frame.head, frame.tail) == (2, range(2, 3))


def test_what_follows_the_prompt_speaks_again() -> None:
    assert spoken(Frame(2, range(4, 6)), 8) == [2, 3, 6, 7]


def test_common_prefix_counts_shared_tokens() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([], [1]) == 0
