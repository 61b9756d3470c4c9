"""Every option of a chat request, through a running gateway."""

import json
import math
from typing import Any

import openai
import pytest

from tests.inference_gateway.conftest import Running
from tests.inference_gateway.test_chat_api import ask

ATTRIBUTED = {"extra_body": {"seqr": {"attribution": True}}}


def ids_of(answer: Any) -> list[int]:
    """The token ids of an answer that was asked for with ``ATTRIBUTED``."""
    return [token["id"] for token in answer.choices[0].model_extra["seqr"]["tokens"]]


def text_of(answer: Any, index: int = 0) -> str:
    return answer.choices[index].message.content


def test_n_choices_are_independent_and_the_first_is_the_one_asked_alone(running: Running) -> None:
    drawn = {"temperature": 1.2, "seed": 7, "max_tokens": 12}
    three = ask(running, "alice", n=3, **drawn)
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    texts = [text_of(three, index) for index in range(3)]
    assert len(set(texts)) == 3
    assert texts == [text_of(ask(running, "alice", n=3, **drawn), index) for index in range(3)]
    alone = ask(running, "alice", **drawn)
    assert text_of(alone) == texts[0]
    assert three.usage.prompt_tokens == alone.usage.prompt_tokens
    assert three.usage.completion_tokens > alone.usage.completion_tokens


def test_a_stream_of_n_choices_says_the_same_as_a_plain_answer(running: Running) -> None:
    drawn = {"temperature": 1.2, "seed": 7, "max_tokens": 12, "n": 3}
    plain = ask(running, "alice", **drawn)
    chunks = list(ask(running, "alice", stream=True, stream_options={"include_usage": True}, **drawn))
    texts, reasons = ["", "", ""], [None] * 3
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason
    assert texts == [text_of(plain, index) for index in range(3)]
    assert reasons == [choice.finish_reason for choice in plain.choices]
    assert sum(chunk.usage is not None for chunk in chunks) == 1 and chunks[-1].usage == plain.usage


def test_logprobs_are_told_for_every_token_of_the_text(running: Running) -> None:
    answer = ask(running, "alice", logprobs=True, top_logprobs=3, max_tokens=10)
    content = answer.choices[0].logprobs.content
    assert b"".join(bytes(one.bytes) for one in content).decode("utf-8", "replace") == text_of(answer)
    for one in content:
        assert len(one.top_logprobs) == 3
        # Greedy: the chosen token is the likeliest of the raw distribution.
        assert one.top_logprobs[0].logprob == one.logprob and one.top_logprobs[0].bytes == one.bytes
        assert [alt.logprob for alt in one.top_logprobs] == sorted((a.logprob for a in one.top_logprobs), reverse=True)
        assert sum(math.exp(alt.logprob) for alt in one.top_logprobs) <= 1.000001
    chunks = list(ask(running, "alice", logprobs=True, top_logprobs=3, max_tokens=10, stream=True))
    streamed = [one for c in chunks for o in c.choices if o.logprobs for one in o.logprobs.content]
    assert streamed == content


def test_logprobs_without_alternatives(running: Running) -> None:
    content = ask(running, "alice", logprobs=True).choices[0].logprobs.content
    assert content and all(one.top_logprobs == [] and one.logprob < 0 for one in content)
    assert ask(running, "alice").choices[0].logprobs is None


def test_logprobs_do_not_change_with_temperature_or_bias(running: Running) -> None:
    plain = ask(running, "alice", logprobs=True, max_tokens=4, **ATTRIBUTED)
    biased = {"temperature": 0.7, "seed": 1, "logit_bias": {str(ids_of(plain)[0]): 50}, "max_tokens": 1}
    again = ask(running, "alice", logprobs=True, **biased)
    assert again.choices[0].logprobs.content[0] == plain.choices[0].logprobs.content[0]


def test_logit_bias_forces_and_bans_tokens(running: Running) -> None:
    tokens = running.http("alice").post("/tokenize", json={"prompt": "ab"}).json()["tokens"][-2:]
    forced = ask(running, "alice", logit_bias={str(tokens[0]): 100}, max_tokens=5)
    assert text_of(forced) == "aaaaa"
    # A penalty for every repetition lets the second one in between.
    both = {str(token): 100 for token in tokens}
    assert set(text_of(ask(running, "alice", logit_bias=both, frequency_penalty=2, max_tokens=40))) == {"a", "b"}
    first = ids_of(ask(running, "alice", max_tokens=1, **ATTRIBUTED))[0]
    banned = ask(running, "alice", max_tokens=12, logit_bias={str(first): -100}, **ATTRIBUTED)
    assert first not in ids_of(banned)


@pytest.mark.parametrize(
    "penalty", [{"presence_penalty": 2}, {"frequency_penalty": 2}, {"extra_body": {"repetition_penalty": 5.0}}]
)
def test_penalties_change_an_answer_that_repeats_itself(running: Running, penalty: dict[str, Any]) -> None:
    plain = text_of(ask(running, "alice", max_tokens=60))
    assert text_of(ask(running, "alice", max_tokens=60, **penalty)) != plain


@pytest.mark.parametrize("penalty", [5e-324, 1e-308, 1e-300, 10.0])
@pytest.mark.parametrize("cut", [{}, {"top_k": 5}, {"min_p": 0.1}, {"top_p": 0.5}])
def test_the_smallest_and_the_largest_repetition_penalty_are_answered(
    running: Running, penalty: float, cut: dict[str, Any]
) -> None:
    for temperature in (0, 1e-5, 2):
        body = {"repetition_penalty": penalty, **cut}
        answer = ask(running, "alice", temperature=temperature, seed=1, max_tokens=12, extra_body=body)
        assert answer.choices[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    ("penalty", "message"), [(0, "Input should be greater than 0"), (10.1, "Input should be less than or equal to 10")]
)
def test_a_repetition_penalty_beyond_its_ends_is_refused(running: Running, penalty: float, message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=f"repetition_penalty: {message}"):
        ask(running, "alice", extra_body={"repetition_penalty": penalty})


@pytest.mark.parametrize("cut", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 0.0}])
def test_a_cut_to_one_token_makes_any_temperature_greedy(running: Running, cut: dict[str, Any]) -> None:
    hot = ask(running, "alice", temperature=2, max_tokens=12, extra_body=cut)
    assert text_of(hot) == text_of(ask(running, "alice", max_tokens=12))
    free = ask(running, "alice", temperature=2, seed=1, max_tokens=12, extra_body={"top_k": -1, "min_p": 0})
    assert text_of(free) != text_of(hot)


def test_a_seed_repeats_whatever_else_runs(running: Running) -> None:
    drawn = {"temperature": 1.3, "seed": 99, "max_tokens": 16}
    alone = text_of(ask(running, "alice", **drawn))
    crowd = [ask(running, "bob", stream=True, temperature=1.9, max_tokens=40) for _ in range(4)]
    assert text_of(ask(running, "alice", **drawn)) == alone
    for stream in crowd:
        stream.close()


@pytest.mark.parametrize("place", ["stop", "stop_token_ids"])
def test_a_stop_token_ends_the_answer_and_is_not_shown(running: Running, place: str) -> None:
    full = ask(running, "alice", max_tokens=12, logprobs=True, **ATTRIBUTED)
    ids = ids_of(full)
    wanted = next(index for index in range(3, len(ids)) if ids[index] not in ids[:index])
    body = ATTRIBUTED["extra_body"] | {place: [ids[wanted]]}
    answer = ask(running, "alice", max_tokens=12, logprobs=True, extra_body=body)
    assert ids_of(answer) == ids[:wanted]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs.content == full.choices[0].logprobs.content[:wanted]
    assert answer.usage.completion_tokens == wanted + 1


@pytest.mark.parametrize("mode", ["prompt_evidence", "evidence", "per_token"])
def test_attribution_tells_of_every_token(running: Running, mode: str) -> None:
    asked = {"extra_body": {"seqr": {"attribution": True, "routing": mode}}, "max_tokens": 8}
    answer = ask(running, "alice", **asked)
    tokens = answer.choices[0].model_extra["seqr"]["tokens"]
    assert "".join(token["token"] for token in tokens) == text_of(answer)
    assert all(set(token) == {"token", "id", "silo", "shares", "margin"} for token in tokens)
    assert all(sum(token["shares"].values()) == pytest.approx(1.0, abs=1e-5) for token in tokens)
    assert all(token["margin"] >= 0 for token in tokens)
    assert all(token["shares"][token["silo"]] == max(token["shares"].values()) for token in tokens)
    chunks = list(ask(running, "alice", stream=True, **asked))
    told = [one for c in chunks for o in c.choices for one in (o.model_extra.get("seqr") or {}).get("tokens", [])]
    assert told == tokens
    assert chunks[-1].model_extra["seqr"] == answer.model_extra["seqr"]


def test_attribution_is_only_told_when_asked_for(running: Running) -> None:
    assert "seqr" not in ask(running, "alice").to_dict()
    assert "seqr" not in ask(running, "alice").to_dict()["choices"][0]


PERSON = {
    "type": "object",
    "properties": {
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["adult", "child"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "minItems": 1, "maxItems": 3},
    },
    "required": ["age", "kind", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(6))
def test_an_answer_under_a_schema_parses_and_fits_it(running: Running, seed: int) -> None:
    shape = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    answer = ask(running, "alice", response_format=shape, temperature=1.5, seed=seed, max_tokens=120)
    person = json.loads(text_of(answer))
    assert answer.choices[0].finish_reason == "stop"
    assert list(person) == ["age", "kind", "tags"]
    assert 0 <= person["age"] <= 150 and person["kind"] in ("adult", "child")
    assert 1 <= len(person["tags"]) <= 3 and all(len(tag) <= 4 for tag in person["tags"])


def test_a_schema_binds_greedy_answers_streams_and_choices_alike(running: Running) -> None:
    shape = {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}}
    plain = ask(running, "alice", response_format=shape, max_tokens=120, n=2)
    assert json.loads(text_of(plain, 0)) == json.loads(text_of(plain, 1))
    chunks = list(ask(running, "alice", response_format=shape, max_tokens=120, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text_of(plain)


def test_json_object_begins_as_an_object(running: Running) -> None:
    answer = ask(running, "alice", response_format={"type": "json_object"}, temperature=1.0, seed=3, max_tokens=20)
    assert text_of(answer).startswith("{")


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "objekt"}, "Invalid type: objekt"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"$ref": "#/nope"}, "'/nope' does not exist"),
        ({"type": "integer", "minimum": 5, "maximum": 1}, "minimum (5) is greater than maximum (1)"),
        ({"not": {"type": "string"}}, "Unimplemented keys"),
        ({"enum": []}, "anyOf is empty"),
        ({"type": "object", "x-guidance": {"lenient": True}}, "x-guidance is not a keyword"),
        ({"enum": ["x" * 70_000]}, "at most 65536 are allowed"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_schema_that_cannot_be_kept_to_is_refused_with_the_reason(
    running: Running, schema: dict[str, Any], reason: str
) -> None:
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError) as refused:
        ask(running, "alice", response_format=shape)
    assert refused.value.code == "invalid_value" and refused.value.param == "response_format.json_schema.schema"
    assert reason in refused.value.body["message"]  # type: ignore[index]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("pattern", ["^(a{1000}){50}$", "^((ab){1000}){20}$"])
def test_a_pattern_that_makes_every_token_slow_is_refused(running: Running, pattern: str, stream: bool) -> None:
    schema = {"type": "string", "pattern": pattern}
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match="the answer's grammar cannot be followed") as refused:
        ask(running, "alice", response_format=shape, stream=stream)
    assert refused.value.code == "grammar_too_complex"


FORMATS = ("date-time", "date", "time", "email", "uri", "uuid", "ipv4", "ipv6")
NESTED: dict[str, Any] = {"type": "integer"}
for _ in range(20):
    NESTED = {"type": "object", "properties": {"n": {"type": "string"}, "inner": NESTED}, "required": ["n", "inner"]}
ORDINARY: dict[str, list[dict[str, Any]]] = {
    "nested objects": [NESTED],
    "enums of 200": [{"enum": [f"{word} {number}" for number in range(200)]} for word in ("value", "option", "kind")],
    "long strings": [{"type": "string", "maxLength": longest} for longest in (200, 4000, 20_000)],
    "formats": [{"type": "string", "format": name} for name in FORMATS * 10],
    "ranges": [{"type": "integer", "minimum": -number * 1007, "maximum": 10**9 + number} for number in range(80)],
    "patterns": [{"type": "string", "pattern": f"^[A-Za-z0-9_.-]{{1,{longest}}}$"} for longest in range(100, 200)],
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_schemas_are_far_from_the_grammars_limits(running: Running, name: str) -> None:
    fields = {f"f{index}": schema for index, schema in enumerate(ORDINARY[name])}
    schema = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert text_of(ask(running, "alice", response_format=shape, max_tokens=20, temperature=1, seed=1)).startswith("{")
