"""The unmodified OpenAI client against the gateway: what works, and what is refused by name."""

import json
from typing import Any

import openai
import pytest

from tests.inference_gateway.conftest import Running

QUESTION = [{"role": "user", "content": "Where is the red boat?"}]
MODEL = "tiny"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
TOOL_ANSWER = {"role": "tool", "content": "x", "tool_call_id": "call_1"}


def ask(running: Running, user: str, **options: Any) -> Any:
    return running.openai(user).chat.completions.create(
        **{"model": MODEL, "messages": QUESTION, "max_tokens": 8, **options}
    )


def test_a_plain_answer_has_text_usage_and_an_end(running: Running) -> None:
    answer = ask(running, "alice")
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.completion_tokens <= 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_says_the_same_as_a_plain_answer(running: Running) -> None:
    plain = ask(running, "alice")
    chunks = list(ask(running, "alice", stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == plain.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == plain.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage == plain.usage


def test_a_stream_ends_with_done(running: Running) -> None:
    body = {"model": MODEL, "messages": QUESTION, "max_tokens": 3, "stream": True}
    with running.http("alice").stream("POST", "/v1/chat/completions", json=body) as response:
        events = [line for line in response.iter_lines() if line]
    assert response.headers["content-type"].startswith("text/event-stream")
    assert events[-1] == "data: [DONE]"
    assert all(json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk" for event in events[:-1])


def test_permitted_silos_shape_the_answer_and_are_named(running: Running) -> None:
    texts = {user: ask(running, user).choices[0].message.content for user in ("alice", "bob", "carol")}
    assert len(set(texts.values())) == 3
    told = ask(running, "alice", extra_body={"seqr": {"attribution": True}}).model_extra["seqr"]
    assert told["permitted"] == ["alpha", "gamma"] and told["routing"] == "prompt_evidence"
    assert set(told["shares"]) <= {"alpha", "gamma"} and sum(told["shares"].values()) == pytest.approx(1.0)
    assert sum(told["answer_shares"].values()) == pytest.approx(1.0)
    assert ask(running, "carol", extra_body={"seqr": {"attribution": True}}).model_extra["seqr"]["shares"] == {}


def test_silos_narrow_the_permitted_set(running: Running) -> None:
    told = ask(running, "alice", extra_body={"seqr": {"attribution": True, "silos": ["gamma"]}}).model_extra["seqr"]
    assert told["permitted"] == ["gamma"] and told["shares"] == {"gamma": 1.0}
    by_name = ask(running, "alice", model="silo:gamma", extra_body={"seqr": {"attribution": True}})
    assert by_name.model_extra["seqr"]["shares"] == {"gamma": 1.0}
    none = ask(running, "alice", extra_body={"seqr": {"attribution": True, "silos": []}}).model_extra["seqr"]
    assert none["permitted"] == []


def test_every_routing_mode_can_be_asked_for(running: Running) -> None:
    modes = ("prompt_evidence", "evidence", "per_token")
    told = {
        mode: ask(running, "alice", extra_body={"seqr": {"attribution": True, "routing": mode}}).model_extra["seqr"]
        for mode in modes
    }
    assert [told[mode]["routing"] for mode in modes] == list(modes)
    assert len({str(told[mode]["shares"]) for mode in modes}) == 3
    assert len(told["prompt_evidence"]["shares"]) == 1  # one silo for the whole answer
    assert sum(told["evidence"]["shares"].values()) < 1.0  # the chat's frame is the base model's


@pytest.mark.parametrize("place", ["silos", "model"])
def test_a_forbidden_and_an_unknown_silo_look_the_same(running: Running, place: str) -> None:
    def refusal(silo: str) -> tuple[int, dict[str, Any], dict[str, str]]:
        body: dict[str, Any] = {"model": MODEL, "messages": QUESTION}
        body |= {"seqr": {"silos": [silo]}} if place == "silos" else {"model": f"silo:{silo}"}
        same = {"X-Request-Id": "same"}
        response = running.http("alice").post("/v1/chat/completions", json=body, headers=same)
        headers = {k: v for k, v in response.headers.items() if k not in ("date", "content-length")}
        return response.status_code, json.loads(response.text.replace(silo, "X")), headers

    assert refusal("beta") == refusal("atlantis")
    assert refusal("beta")[0] == 404 and refusal("beta")[1]["error"]["code"] == "model_not_found"


def test_a_permitted_silo_without_an_adapter_says_so(running: Running) -> None:
    with pytest.raises(openai.InternalServerError) as refused:
        ask(running, "alice", extra_body={"seqr": {"silos": ["nobody"]}})
    assert refused.value.status_code == 503 and refused.value.code == "silo_unavailable"


def test_models_are_the_callers_own_view(running: Running) -> None:
    assert [m.id for m in running.openai("alice").models.list()] == [MODEL, "silo:alpha", "silo:gamma"]
    assert [m.id for m in running.openai("bob").models.list()] == [MODEL, "silo:beta"]
    assert [m.id for m in running.openai("carol").models.list()] == [MODEL]
    assert running.openai("bob").models.retrieve("silo:beta").id == "silo:beta"
    for name in ("silo:alpha", "silo:atlantis", "gpt-4"):
        with pytest.raises(openai.NotFoundError):
            running.openai("bob").models.retrieve(name)


def test_headers_name_the_policy_and_only_the_callers_part_of_the_library(running: Running) -> None:
    def headers(user: str, **extra: str) -> Any:
        body = {"model": MODEL, "messages": QUESTION, "max_tokens": 1}
        return running.http(user).post("/v1/chat/completions", json=body, headers=extra).headers

    alice, bob = headers("alice", **{"X-Request-Id": "my-own.id"}), headers("bob")
    assert alice["x-request-id"] == "my-own.id" and bob["x-request-id"]
    assert headers("bob", **{"X-Request-Id": "no spaces allowed"})["x-request-id"] != "no spaces allowed"
    assert int(alice["x-seqr-policy-version"]) > 0
    assert alice["x-seqr-library-version"] != bob["x-seqr-library-version"] == headers("bob")["x-seqr-library-version"]


def test_stop_strings_end_the_answer_before_them(running: Running) -> None:
    full = ask(running, "alice", max_tokens=12).choices[0].message.content
    stop = full[4:6]
    answer = ask(running, "alice", max_tokens=12, stop=[stop, "\x00never"])
    assert answer.choices[0].message.content == full[: full.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    chunks = list(ask(running, "alice", max_tokens=12, stop=stop, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == full[: full.index(stop)]


@pytest.mark.parametrize("mode", ["prompt_evidence", "per_token"])
def test_an_answer_that_ends_at_a_stop_string_has_the_shares_of_the_same_answer_cut_by_length(
    running: Running, mode: str
) -> None:
    told = {"seqr": {"attribution": True, "routing": mode}}
    full = ask(running, "alice", max_tokens=12, extra_body=told).choices[0].message.content
    stopped = ask(running, "alice", max_tokens=12, stop=full[4:6], extra_body=told)
    assert stopped.choices[0].finish_reason == "stop"
    cut = ask(running, "alice", max_tokens=stopped.usage.completion_tokens, extra_body=told)
    assert stopped.model_extra["seqr"] == cut.model_extra["seqr"]
    assert sum(stopped.model_extra["seqr"]["answer_shares"].values()) == pytest.approx(1.0)


def test_a_seed_repeats_its_draws_and_another_does_not(running: Running) -> None:
    def drawn(seed: int) -> str:
        return ask(running, "alice", temperature=1.3, top_p=0.95, seed=seed, max_tokens=16).choices[0].message.content

    assert drawn(5) == drawn(5)
    assert len({drawn(seed) for seed in range(4)}) > 1
    greedy = ask(running, "alice", max_tokens=16).choices[0].message.content
    assert ask(running, "alice", temperature=1.0, top_p=0.0, seed=1, max_tokens=16).choices[0].message.content == greedy


@pytest.mark.parametrize(
    ("options", "code", "param"),
    [
        ({"n": True}, "invalid_value", "n"),
        ({"n": 17}, "invalid_value", "n"),
        ({"best_of": 2}, "unsupported_parameter", "best_of"),
        ({"echo": True}, "unsupported_parameter", "echo"),
        ({"suffix": "x"}, "unsupported_parameter", "suffix"),
        ({"store": True}, "unsupported_parameter", "store"),
        ({"audio": {"voice": "x"}}, "unsupported_parameter", "audio"),
        ({"functions": [{"name": "f"}]}, "unsupported_parameter", "functions"),
        ({"parallel_tool_calls": False}, "unsupported_parameter", "parallel_tool_calls"),
        ({"ignore_eos": True}, "unsupported_parameter", "ignore_eos"),
        ({"stream_options": {"include_usage": True}}, "unsupported_parameter", "stream_options"),
        ({"top_logprobs": 3}, "invalid_value", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
        ({"logprobs": 3}, "invalid_value", "logprobs"),
        ({"tools": [{"type": "function"}]}, "missing_parameter", "tools.0.function"),
        ({"tools": [TOOL]}, "unsupported_parameter", "tools"),
        ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
        ({"logit_bias": {"five": 1}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"259": 1}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"5": 101}}, "invalid_value", "logit_bias.5"),
        ({"presence_penalty": 2.5}, "invalid_value", "presence_penalty"),
        ({"frequency_penalty": -3}, "invalid_value", "frequency_penalty"),
        ({"repetition_penalty": 0}, "invalid_value", "repetition_penalty"),
        ({"top_p": 1.1}, "invalid_value", "top_p"),
        ({"top_k": -2}, "invalid_value", "top_k"),
        ({"min_p": 2}, "invalid_value", "min_p"),
        ({"seed": 2**63}, "invalid_value", "seed"),
        ({"stop": list("abcde")}, "unsupported_parameter", "stop"),
        ({"stop": [""]}, "invalid_value", "stop.0"),
        ({"stop": [259]}, "invalid_value", "stop"),
        ({"stop_token_ids": [259]}, "invalid_value", "stop_token_ids"),
        ({"response_format": {"type": "yaml"}}, "invalid_value", "response_format"),
        ({"response_format": {"type": "json_schema"}}, "missing_parameter", "response_format.json_schema"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "invalid_value", "messages.0"),
        ({"messages": [TOOL_ANSWER]}, "unsupported_parameter", "messages"),
        ({"messages": [{"role": "function", "content": "x"}]}, "unsupported_parameter", "messages.0"),
        ({"messages": [{"role": "user", "content": None}]}, "invalid_value", "messages.0.content"),
        ({"messages": [{"role": "user", "content": 5}]}, "invalid_value", "messages.0.content"),
        ({"messages": [{"role": "judge", "content": "x"}]}, "invalid_value", "messages.0.role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "unsupported_parameter",
            "messages.0.content",
        ),
        ({"colour": "red"}, "unknown_parameter", "colour"),
        ({"seqr": {"sillos": []}}, "unknown_parameter", "seqr.sillos"),
        ({"seqr": {"routing": "by mood"}}, "invalid_value", "seqr.routing"),
        ({"temperature": -1}, "invalid_value", "temperature"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": "hello"}, "invalid_value", "messages"),
        ({"model": "gpt-4"}, "model_not_found", "model"),
        ({"max_tokens": 5000}, "context_length_exceeded", "max_tokens"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "context_length_exceeded", "messages"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    running: Running, options: dict[str, Any], code: str, param: str
) -> None:
    body = {"model": MODEL, "messages": QUESTION, **options}
    response = running.http("alice").post("/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert response.status_code == (404 if code == "model_not_found" else 400)
    assert (error["code"], error["param"]) == (code, param)
    assert error["message"] and error["type"]


def test_parameters_that_ask_for_nothing_are_accepted(running: Running) -> None:
    nothing = {"n": 1, "logprobs": False, "presence_penalty": 0, "tools": [], "response_format": {"type": "text"}}
    answer = ask(running, "alice", extra_body={**nothing, "user": "somebody"})
    assert answer.choices[0].message.content is not None


def test_max_completion_tokens_counts_as_max_tokens(running: Running) -> None:
    answer = ask(running, "alice", max_tokens=None, max_completion_tokens=3)
    assert answer.usage.completion_tokens <= 3


def test_health_needs_no_key_and_tells_nothing(running: Running) -> None:
    assert running.http().get("/healthz").json() == {"status": "ok"}
    ready = running.http().get("/readyz")
    assert ready.status_code == 200 and ready.json() == {"status": "ready"}


def test_every_route_of_the_api_needs_a_key(running: Running) -> None:
    routes = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")
    for method, path in [("POST", route) for route in routes] + [("GET", "/v1/models"), ("GET", "/v1/models/x")]:
        response = running.http().request(method, path, json={"model": MODEL, "messages": QUESTION})
        assert response.status_code == 401 and response.json()["error"]["code"] == "key_missing"
        assert response.headers["www-authenticate"] == "Bearer"
