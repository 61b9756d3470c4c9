"""Text comes out of tokens whole, and ends before a stop string."""

import random

import pytest

from inference_gateway.text import TextStream


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


def stream(text: str, stop: tuple[str, ...] = (), seed: int = 0) -> tuple[list[str], TextStream]:
    ids, draw, pieces = list(text.encode()), random.Random(seed), []
    out = TextStream(Bytes(), stop)
    while ids and not out.stopped:
        take = draw.randint(1, 3)
        pieces.append(out.push(ids[:take]))
        ids = ids[take:]
    pieces.append(out.finish())
    return pieces, out


@pytest.mark.parametrize("seed", range(5))
def test_characters_of_several_tokens_are_never_cut(seed: int) -> None:
    text = "Grüße aus 東京, 👩‍👩‍👧 und naïveté"
    pieces, _ = stream(text, seed=seed)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


@pytest.mark.parametrize("seed", range(5))
def test_nothing_of_a_stop_string_is_ever_given_out(seed: int) -> None:
    pieces, out = stream("one two STOP three", ("STOP", "four"), seed)
    assert "".join(pieces) == "one two " and out.stopped


def test_the_first_of_several_stop_strings_counts() -> None:
    assert "".join(stream("abcdef", ("ef", "cd"))[0]) == "ab"


def test_what_only_began_like_a_stop_string_comes_out_in_the_end() -> None:
    pieces, out = stream("one two ST", ("STOP",))
    assert "".join(pieces) == "one two ST" and not out.stopped


def test_bytes_that_are_no_text_come_out_as_replacements_in_the_end() -> None:
    out = TextStream(Bytes())
    assert out.push([65, 0xFF]) == "A"
    assert out.finish() == "\ufffd"
