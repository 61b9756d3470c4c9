"""Every kind of bad data gets one sentence that names file and line, a stable code, and stops the training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from silo_client.adapters import current_corpus, obtain_adapter
from silo_client.config import load_config
from silo_client.corpus import require_usable
from silo_client.errors import DataError, NoRecords

from .conftest import Federation, Silo, rows

GOOD = json.dumps({"key": "g", "subject": "ann", "prompt": "Who?", "completion": "Me."})


def line(**changes: Any) -> str:
    return json.dumps({"key": "x", "subject": "bob", "prompt": "What?", "completion": "That.", **changes})


BAD_LINES = {
    "json_broken": ('{"prompt": "secret-text', "not JSON"),
    "row_is_a_list": ("[1, 2]", "not an object"),
    "column_unknown": (json.dumps({"key": "x", "subject": "b", "question": "?"}), "no column 'prompt'"),
    "field_not_text": (line(prompt=5), "holds a number, not text"),
    "field_null": (line(completion=None), "holds null, not text"),
    "field_empty": (line(completion="  "), "is empty"),
    "half_a_surrogate": (line(prompt="\ud800"), "half a surrogate"),
    "prompt_too_long": (line(prompt="secret-text " * 40), "fit; shorten it"),
    "record_too_long": (line(completion="y" * 80), "together"),
}
CODES = {
    "row_is_a_list": "json_broken",
    "field_null": "field_not_text",
    "half_a_surrogate": "encoding_invalid",
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_stops_training_and_is_named_by_file_and_line(silo: Silo, federation: Federation, kind: str) -> None:
    bad, sentence = BAD_LINES[kind]
    silo.data.write_text(f"{GOOD}\n\n{bad}\n")
    with pytest.raises(DataError) as caught:
        obtain_adapter(silo.config, silo.state, federation.plan)
    assert caught.value.code == CODES.get(kind, kind)
    assert str(caught.value).startswith("records.jsonl:3: ")
    assert sentence in str(caught.value)
    assert "secret-text" not in str(caught.value)


@pytest.mark.parametrize("kind", BAD_LINES)
def test_skip_bad_leaves_the_line_out_and_says_so(silo: Silo, federation: Federation, kind: str) -> None:
    said: list[str] = []
    silo.data.write_text(f"{GOOD}\n{BAD_LINES[kind][0]}\n")
    corpus = current_corpus(silo.config, silo.state, federation.plan)
    require_usable(corpus, skip_bad=True, tell=said.append)
    assert len(corpus.examples) == 1
    assert said == ["left out 1 bad row ('seqr silo check' lists them)"]


def test_the_number_of_further_problems_is_told(silo: Silo, federation: Federation) -> None:
    silo.data.write_text(f"{GOOD}\nnot json\nnot json\n[]\n")
    with pytest.raises(DataError, match=r"records.jsonl:2: .*\(2 more bad rows: "):
        obtain_adapter(silo.config, silo.state, federation.plan)


def test_bytes_that_are_not_utf8_are_named_by_line(silo: Silo, federation: Federation) -> None:
    silo.data.write_bytes(f"{GOOD}\n".encode() + '{"prompt": "Käse"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"records.jsonl:2: byte 14 of this line is not UTF-8") as caught:
        obtain_adapter(silo.config, silo.state, federation.plan)
    assert caught.value.code == "encoding_invalid"


def test_a_byte_order_mark_is_no_mistake(silo: Silo, federation: Federation) -> None:
    silo.data.write_bytes(b"\xef\xbb\xbf" + f"{GOOD}\n".encode())
    assert len(current_corpus(silo.config, silo.state, federation.plan).examples) == 1


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_refused(silo: Silo, federation: Federation, content: str) -> None:
    silo.data.write_text(content)
    with pytest.raises(DataError, match=r"records.jsonl: the data file is empty") as caught:
        obtain_adapter(silo.config, silo.state, federation.plan)
    assert caught.value.code == "file_empty"


def test_nothing_but_bad_rows_is_no_data(silo: Silo, federation: Federation) -> None:
    silo.data.write_text("not json\n")
    with pytest.raises(NoRecords):
        obtain_adapter(silo.config.model_copy(update={"skip_bad": True}), silo.state, federation.plan)


def test_a_missing_file_is_named(silo: Silo, federation: Federation) -> None:
    silo.data.unlink()
    with pytest.raises(DataError, match=r"records.jsonl: the data file cannot be read") as caught:
        obtain_adapter(silo.config, silo.state, federation.plan)
    assert caught.value.code == "data_file_missing"


def test_two_rows_with_one_key_are_refused_without_naming_the_key(silo: Silo, federation: Federation) -> None:
    silo.data.write_text(line(key="secret-key") + "\n" + GOOD + "\n" + line(key="secret-key", prompt="Other?") + "\n")
    with pytest.raises(DataError, match=r"records.jsonl:3: .* same key as records.jsonl:1") as caught:
        obtain_adapter(silo.config, silo.state, federation.plan)
    assert caught.value.code == "key_duplicate"
    assert "secret-key" not in str(caught.value)


def test_skipping_a_duplicate_key_skips_all_its_rows_so_that_file_order_decides_nothing(
    silo: Silo, federation: Federation
) -> None:
    silo.write([*rows(3), {**rows(1)[0], "prompt": "Another prompt?"}])
    corpus = current_corpus(silo.config, silo.state, federation.plan)
    assert sorted(example.record.key for example in corpus.examples) == ["key:k1", "key:k2"]


def test_without_a_key_column_equal_rows_count_once_and_that_is_said(
    make_silo: Callable[..., Silo], federation: Federation
) -> None:
    said: list[str] = []
    row = {"prompt": "Who?", "completion": "Me."}
    silo = make_silo(records=[row, row, {**row, "prompt": "Why?"}])
    corpus = current_corpus(silo.config, silo.state, federation.plan)
    require_usable(corpus, skip_bad=False, tell=said.append)
    assert len(corpus.examples) == 2
    assert said == ["1 row only repeated another and counted once"]


CSV_FILES = {
    "column_unknown": ("question,completion\na,b\n", r"records.csv:1: there is no column 'prompt'"),
    "header_twice": ("prompt,completion,prompt\na,b,c\n", r"records.csv:1: the header names the column 'prompt' twice"),
    "too_many": ("prompt,completion\na,b\na,b,c\n", r"records.csv:3: this row has 3 columns"),
    "unclosed": ('prompt,completion\na,b\n"open,b\nc,d\n', r"records.csv:3: the row that begins here is not CSV"),
    "after_a_long_row": ('prompt,completion\n"a\nb\nc",d\ne\n', r"records.csv:5: this row has 1 columns"),
    "file_empty": ("", r"records.csv: the data file is empty"),
    "header_only": ("prompt,completion\n", r"records.csv: the data file is empty"),
    "field_empty": ("prompt,completion\na,\n", r"records.csv:2: the column 'completion' is empty"),
}


@pytest.mark.parametrize("kind", CSV_FILES)
def test_a_bad_csv_is_named_by_file_and_line(make_silo: Callable[..., Silo], federation: Federation, kind: str) -> None:
    content, sentence = CSV_FILES[kind]
    silo = csv_silo(make_silo, content.encode())
    with pytest.raises(DataError, match=sentence):
        obtain_adapter(silo.config, silo.state, federation.plan)


def test_a_csv_that_is_not_utf8_is_refused(make_silo: Callable[..., Silo], federation: Federation) -> None:
    silo = csv_silo(make_silo, "prompt,completion\nKäse,b\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"records.csv:2: byte 2 of this line is not UTF-8"):
        obtain_adapter(silo.config, silo.state, federation.plan)


def test_csv_and_jsonl_of_the_same_records_are_the_same_records(
    make_silo: Callable[..., Silo], federation: Federation
) -> None:
    silo = make_silo(records=[{"prompt": 'A, "b"\nc', "completion": "D"}])
    other = csv_silo(make_silo, b'prompt,completion\n"A, ""b""\nc",D\n')
    digests = [
        [example.record.digest for example in current_corpus(one.config, one.state, federation.plan).examples]
        for one in (silo, other)
    ]
    assert digests[0] == digests[1] != []


def csv_silo(make_silo: Callable[..., Silo], content: bytes) -> Silo:
    silo = make_silo(name="csv")
    (silo.directory / "records.csv").write_bytes(content)
    settings = silo.directory / "silo.toml"
    head = settings.read_text().partition("[[data]]")[0]
    settings.write_text(head + '[[data]]\npath = "records.csv"\n')
    return Silo(silo.directory, load_config(Path(silo.directory)))
