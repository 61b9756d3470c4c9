import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seqr.canonical import JsonMalformed, NotCanonical, array_digest, canonical_json, parse_json, sha256_hex

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(st.text("aé\x00\U0001f600", max_size=3), children)
    ),
    max_leaves=12,
)


def test_one_value_has_one_byte_string():
    value = {"b": [1, 2.5, -0.0, None, True], "a": "é\n", "ä": {}, "B": 1e22}
    assert canonical_json(value) == '{"B":1e+22,"a":"é\\n","b":[1,2.5,-0.0,null,true],"ä":{}}'.encode()
    assert canonical_json(dict(reversed(value.items()))) == canonical_json(value)


@given(json_values)
def test_reading_back_gives_the_same_value_and_the_same_bytes(value):
    data = canonical_json(value)
    again = parse_json(data, "value", 1 << 20)
    assert again == value
    assert canonical_json(again) == data


@pytest.mark.parametrize(
    "value",
    [float("nan"), [float("inf")], {1: "a"}, {None: 1}, {"a": b"bytes"}, {"a": {1, 2}}, "\ud800", {"\udfff": 1}],
    ids=repr,
)
def test_what_json_cannot_carry_is_refused(value):
    with pytest.raises(NotCanonical):
        canonical_json(value)


def test_endless_nesting_is_refused_in_both_directions():
    value: list = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(NotCanonical, match="nested too deeply"):
        canonical_json(value)
    with pytest.raises(JsonMalformed, match="nested too deeply"):
        parse_json(b"[" * 100_000 + b"]" * 100_000, "the plan", 1 << 20)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b'{"a":1}{}',
        b'{"a":1,"a":2}',
        b'[{"a":1,"b":{"c":1,"c":1}}]',
        b"NaN",
        b"[Infinity]",
        b"\xff\xfe{\x00}\x00",
        b'"\xff"',
        b"9" * 5000,
    ],
    ids=lambda data: repr(data[:20]),
)
def test_ambiguous_or_broken_json_is_refused(data):
    with pytest.raises(JsonMalformed, match="the plan"):
        parse_json(data, "the plan", 1 << 20)


def test_size_is_checked_before_anything_is_decoded():
    with pytest.raises(JsonMalformed, match="the plan has 11 bytes, more than the 10 allowed"):
        parse_json(b"\xff" * 11, "the plan", 10)


def test_array_digests_are_fixed():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert array_digest(array) == sha256_hex(b'{"dtype":"float32","shape":[2,3]}\n' + array.tobytes())
    assert array_digest(array) == "b8e62c36c62fcf707f54c6bf6e5d21822516bd1f4e95dc1c0d930029b409147f"


def test_array_digests_depend_on_values_dtype_and_shape_but_not_on_memory_layout():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert array_digest(np.asfortranarray(array)) == array_digest(array)
    assert array_digest(array.astype(">f4")) == array_digest(array)
    others = [array.reshape(3, 2), array.astype(np.float64), array.view(np.int32), -array, array.reshape(6)]
    assert len({array_digest(other) for other in [array, *others]}) == 6
