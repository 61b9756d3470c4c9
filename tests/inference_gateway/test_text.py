"""Text comes out of tokens whole and token by token, and ends before a stop string."""

import random
from pathlib import Path

import pytest
import torch

from inference_gateway.text import TextStream
from seqr.models import load_base_model


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


class Words:
    """A tokenizer whose tokens are words."""

    def __init__(self, *words: str):
        self._words = words

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(self._words[i] for i in ids)


def stream(text: str, stop: tuple[str, ...] = (), seed: int = 0) -> tuple[list[str], TextStream]:
    ids, draw, pieces = list(text.encode()), random.Random(seed), []
    out = TextStream(Bytes(), stop)
    while ids and not out.stopped:
        take = draw.randint(1, 3)
        pieces += out.push(ids[:take])
        ids = ids[take:]
    pieces += out.finish()
    return pieces, out


@pytest.mark.parametrize("seed", range(5))
def test_characters_of_several_tokens_are_never_cut(seed: int) -> None:
    text = "Grüße aus 東京, 👩‍👩‍👧 und naïveté"
    pieces, _ = stream(text, seed=seed)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert len(pieces) == len(text.encode())  # each byte's token has its place


def test_the_last_token_of_a_character_has_it_all() -> None:
    assert stream("aé東")[0] == ["a", "", "é", "", "", "東"]


def test_characters_of_several_tokens_are_whole_with_a_real_tokenizer(model_dir: Path) -> None:
    _, tokenizer = load_base_model(model_dir, torch.float32)
    text = "Grüße, 東京 👩‍👩‍👧!"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    out = TextStream(tokenizer)
    pieces = [piece for token in ids for piece in out.push([token])] + out.finish()
    assert "".join(pieces) == text and len(pieces) == len(ids)


@pytest.mark.parametrize("seed", range(5))
def test_nothing_of_a_stop_string_is_ever_given_out(seed: int) -> None:
    pieces, out = stream("one two STOP three", ("STOP", "four"), seed)
    assert "".join(pieces) == "one two " and out.stopped


def test_the_first_of_several_stop_strings_counts() -> None:
    assert "".join(stream("abcdef", ("ef", "cd"))[0]) == "ab"


def test_a_token_in_which_a_stop_string_begins_is_cut_there() -> None:
    out = TextStream(Words("well ", "thenST", "OP", " more"), ("STOP",))
    assert out.push([0]) == ["well "]
    assert out.push([1]) == []
    assert out.push([2, 3]) == ["then"] and out.stopped
    assert out.push([3]) == [] and out.finish() == []


def test_a_token_that_only_might_begin_a_stop_string_comes_out_later_in_its_place() -> None:
    out = TextStream(Words("S", "T", "x"), ("STOP",))
    assert out.push([0, 1]) == []
    assert out.push([2]) == ["S", "T", "x"]


def test_what_only_began_like_a_stop_string_comes_out_in_the_end() -> None:
    pieces, out = stream("one two ST", ("STOP",))
    assert "".join(pieces) == "one two ST" and not out.stopped


def test_bytes_that_are_no_text_come_out_as_replacements_in_the_end() -> None:
    out = TextStream(Bytes())
    assert out.push([65, 0xFF]) == ["A"]
    assert out.finish() == ["\ufffd"]


def test_bytes_that_never_become_text_do_not_wait_for_ever() -> None:
    out = TextStream(Bytes())
    assert "".join(out.push([0x80] * 8)) == "\ufffd" * 8
