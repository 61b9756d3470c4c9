"""Limits, deadlines, metrics and logs of a running gateway, over HTTP."""

import asyncio
import io
import json
import logging
import re
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from inference_gateway.engine.base import Event, Finished, GenerationRequest, Tokens
from policy.limits import Limits
from seqr.logs import JsonLines, TextLines
from seqr.plan import Plan
from tests.inference_gateway.conftest import HOW, Running, World
from tests.inference_gateway.support import random_adapter

SECRET = "Marguerite Xylophone lives at 7 Quince Lane"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 4}
CHAT = "/v1/chat/completions"
# The tests' own clients, and what `seqr.logs.configure` turns off.
NOT_THE_GATEWAYS = ("httpx", "httpcore", "openai", "uvicorn.access")


@pytest.fixture(scope="module")
def own(make_world: Callable[[Path], World], plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A gateway with room for 64 at once; alice may use alpha, and ops may read metrics."""
    world = make_world(tmp_path_factory.mktemp("limits") / "gateway")
    world.settings = world.settings.model_copy(update={"max_concurrent": 64, "max_prompt_tokens": 200})
    world.coordinator.stage("alpha", 1, random_adapter(plan, 0))
    world.coordinator.stage("beta", 1, random_adapter(plan, 1), signer=world.coordinator.silo_key("gamma"))
    world.grant("alice", "alpha")
    world.policy.create_user("ops", ["service"], **HOW)
    world.keys["ops"] = world.policy.create_key("ops", ["metrics"], **HOW).secret
    server = Running(world).start()
    try:
        server.await_adapters("alpha")
        yield server
    finally:
        server.stop()


@pytest.fixture
def limited(own: Running) -> Callable[..., str]:
    """limited(user=Limits, key=Limits): a new user with these limits; returns the user's name in ``own.world.keys``."""

    def make(user: Limits = Limits(), key: Limits = Limits()) -> str:
        name = f"user-{len(own.world.keys)}"
        own.world.policy.create_user(name, **HOW)
        issued = own.world.policy.create_key(name, ["chat"], **HOW)
        own.world.keys[name] = issued.secret
        for subject, limits in ((f"user:{name}", user), (f"key:{issued.key_id}", key)):
            if limits.given():
                own.world.policy.set_limits(subject, limits, **HOW)
        return name

    return make


def scrape(own: Running) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = own.http("ops").get("/metrics").text
    families = text_string_to_metric_families(text)
    return {(one.name, tuple(sorted(one.labels.items()))): one.value for family in families for one in family.samples}


def test_fifty_parallel_calls_under_a_limit_of_nine_are_nine(own: Running, limited: Callable[..., str]) -> None:
    user = limited(Limits(requests_per_minute=9))
    with own.http(user) as client, ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: client.post(CHAT, json=BODY), range(50)))
    assert sorted(answer.status_code for answer in answers) == [200] * 9 + [429] * 41


def test_a_limited_call_gets_openais_error_with_retry_after_and_headers(
    own: Running, limited: Callable[..., str]
) -> None:
    with own.http(limited(key=Limits(requests_per_minute=1, tokens_per_minute=5000))) as client:
        served, refused = client.post(CHAT, json=BODY), client.post(CHAT, json=BODY)
    assert served.headers["x-ratelimit-limit-requests"] == "1"
    assert served.headers["x-ratelimit-remaining-requests"] == "0"
    assert int(served.headers["x-ratelimit-remaining-tokens"]) < 5000
    assert refused.status_code == 429 and refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    error = refused.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("requests", None, "rate_limit_exceeded")
    assert error["message"].startswith("this key's limit of 1 requests per minute is reached; try again in ")


def test_the_openai_client_raises_rate_limit_error(own: Running, limited: Callable[..., str]) -> None:
    client = own.openai(limited(Limits(tokens_per_minute=1)))
    with pytest.raises(openai.RateLimitError) as refused:
        client.chat.completions.create(**BODY)  # type: ignore[call-overload]
    assert (refused.value.code, refused.value.type) == ("rate_limit_exceeded", "tokens")
    assert refused.value.response.headers["x-should-retry"] == "false"
    assert "retry-after" not in refused.value.response.headers


def test_a_stream_is_limited_before_it_begins_and_settled_when_it_ends(
    own: Running, limited: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    async def held(request: GenerationRequest) -> AsyncGenerator[Event]:
        yield Tokens((70,))
        await asyncio.to_thread(go_on.wait, 30)
        yield Finished("stop")

    monkeypatch.setattr(own.service.serving.engine, "generate", held)
    with own.http(limited(Limits(concurrent_requests=1, tokens_per_day=400))) as client:
        with client.stream("POST", CHAT, json=BODY | {"max_tokens": 200, "stream": True}) as stream:
            refused = client.post(CHAT, json=BODY)
            go_on.set()
            assert stream.status_code == 200 and list(stream.iter_lines())[-2] == "data: [DONE]"
        assert refused.status_code == 429 and "1 requests at once" in refused.json()["error"]["message"]
        assert "x-ratelimit-limit-requests" not in refused.headers  # there is no such limit
        # Of the 200 tokens that were reserved one was used: 200 more fit into the day.
        assert client.post(CHAT, json=BODY | {"max_tokens": 200}).status_code == 200


def test_a_limit_that_is_reached_is_told_before_any_work_on_the_body(own: Running, limited: Callable[..., str]) -> None:
    schema = {"name": "x", "schema": {"type": "no such type"}}
    costly = BODY | {"response_format": {"type": "json_schema", "json_schema": schema}}
    with own.http(limited(Limits(requests_per_minute=1))) as client:
        assert client.post(CHAT, json=costly).status_code == 400  # charged nothing
        assert client.post(CHAT, json=BODY).status_code == 200
        refused = client.post(CHAT, json=costly)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"


def test_every_choice_counts_as_a_request_at_once(own: Running, limited: Callable[..., str]) -> None:
    with own.http(limited(Limits(concurrent_requests=2))) as client:
        assert client.post(CHAT, json=BODY | {"n": 2}).status_code == 200
        refused = client.post(CHAT, json=BODY | {"n": 3})
    assert refused.status_code == 429 and refused.headers["x-should-retry"] == "false"
    assert refused.json()["error"]["message"].startswith(
        "this request asks for 3 answers, more than your limit of 2 requests at once will ever allow"
    )


def test_more_answers_than_the_gateway_can_ever_hold_are_refused_by_name(
    own: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = own.service.settings.model_copy(update={"max_concurrent": 3, "max_waiting": 1})
    monkeypatch.setattr(own.service, "settings", small)
    body = {"model": "tiny", "prompt": ["a", "b"], "max_tokens": 1}
    with own.http("carol") as client:
        both = client.post("/v1/completions", json=body | {"n": 2})
        prompts = client.post("/v1/completions", json=body | {"prompt": ["a"] * 4})
        assert client.post("/v1/completions", json=body | {"prompt": "a", "n": 3}).status_code == 200
    assert (both.status_code, both.json()["error"]["param"]) == (400, "n")
    assert both.json()["error"]["code"] == "invalid_value"
    assert both.json()["error"]["message"] == (
        "4 answers (2 from prompt, n = 2) are more than the 3 that this gateway can take from one request; lower n or "
        "send fewer prompts"
    )
    assert (prompts.status_code, prompts.json()["error"]["param"]) == (400, "prompt")


def test_limits_set_by_the_policy_count_from_the_next_call(own: Running, limited: Callable[..., str]) -> None:
    user = limited()
    with own.http(user) as client:
        assert client.post(CHAT, json=BODY).status_code == 200
        own.world.policy.set_limits(f"user:{user}", Limits(requests_per_minute=1), **HOW)
        assert client.post(CHAT, json=BODY).status_code == 429
        own.world.policy.clear_limits(f"user:{user}", **HOW)
        assert client.post(CHAT, json=BODY).status_code == 200


def test_a_prompt_over_the_gateways_own_maximum_is_refused(own: Running) -> None:
    body = BODY | {"messages": [{"role": "user", "content": "word " * 50}]}
    refused = own.http("alice").post(CHAT, json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert refused.json()["error"]["param"] == "messages"
    assert re.fullmatch(
        r"the prompt has \d+ tokens, this gateway takes at most 200; shorten it", refused.json()["error"]["message"]
    )


def test_a_request_that_takes_too_long_gets_504_and_a_stream_an_event(
    own: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    admission = own.service.admission
    soon = admission.settings.model_copy(update={"request_timeout_seconds": 0.3})
    monkeypatch.setattr(admission, "settings", soon)

    async def stalls(request: GenerationRequest) -> AsyncGenerator[Event]:
        yield Tokens((70, 71))
        await asyncio.sleep(60)

    monkeypatch.setattr(own.service.serving.engine, "generate", stalls)
    answer = own.http("carol").post(CHAT, json=BODY)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "request_timeout")
    assert "longer than the 0.3 s that this gateway allows" in answer.json()["error"]["message"]
    events = own.http("carol").post(CHAT, json=BODY | {"stream": True}).text.strip().split("\n\n")
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "request_timeout"
    assert events[-1] == "data: [DONE]"


# Metrics


def test_a_chat_key_cannot_read_the_metrics_and_no_key_neither(own: Running) -> None:
    for user, status, code in ((None, 401, "key_missing"), ("alice", 403, "scope_missing")):
        refused = own.http(user).get("/metrics")
        assert (refused.status_code, refused.json()["error"]["code"]) == (status, code)
        assert "seqr_" not in refused.text and "alpha" not in refused.text
    assert own.http("ops").get("/metrics").headers["content-type"].startswith("text/plain")


def test_a_metrics_key_cannot_chat(own: Running) -> None:
    refused = own.http("ops").post(CHAT, json=BODY)
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "scope_missing")


def test_the_metrics_tell_what_the_gateway_did(own: Running) -> None:
    before = scrape(own)
    answer = own.http("alice").post(CHAT, json=BODY | {"seqr": {"attribution": True}}).json()
    after = scrape(own)

    def grown(name: str, **labels: str) -> float:
        key = (name, tuple(sorted(labels.items())))
        return after[key] - before.get(key, 0.0)

    usage = answer["usage"]
    assert grown("vllm:prompt_tokens_total", model_name="tiny") == usage["prompt_tokens"]
    assert grown("vllm:generation_tokens_total", model_name="tiny") == usage["completion_tokens"]
    assert grown("vllm:time_to_first_token_seconds_count", model_name="tiny") == 1
    assert grown("seqr_http_responses_total", route=CHAT, method="POST", status="200") == 1
    assert grown("seqr_engine_steps_total") > 0
    assert grown("seqr_routing_choices_total", silo="alpha") > 0
    assert after["seqr_library_adapters", ()] == 1 and after["seqr_adapters_loaded_total", ()] == 1
    assert after["seqr_library_version", ()] == own.service.serving.engine.info().library_version
    assert after["vllm:num_requests_running", (("model_name", "tiny"),)] == 0
    assert after["vllm:num_requests_waiting", (("model_name", "tiny"),)] == 0
    assert after["seqr_ready", ()] == 1
    refused = [key for key in after if key[0] == "seqr_intake_refused_total"]
    assert [after[key] for key in refused] == [1.0]


def test_metrics_hold_no_users_no_keys_and_no_paths_that_callers_choose(own: Running) -> None:
    own.http("alice").get(f"/v1/models/{SECRET}")
    own.http("alice").get("/no/such/path/zzz")
    own.http("alice").request("PROPFIND", "/v1/models")
    text = own.http("ops").get("/metrics").text
    for word in ("alice", "carol", "key-", "Marguerite", "zzz", "PROPFIND"):
        assert word not in text
    assert 'route="-"' in text and 'method="other"' in text and 'route="/v1/models/{name:path}"' in text


def test_every_metric_of_the_dashboard_and_of_the_operators_page_exists(own: Running) -> None:
    own.http("alice").post(CHAT, json=BODY | {"seqr": {"attribution": True}})
    dashboard = json.loads(resources.files("inference_gateway").joinpath("grafana/seqr-gateway.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    asked = {name for query in queries for name in re.findall(r"\b(?:vllm:|seqr_|process_)\w+", query)}
    page = (Path(__file__).parents[2] / "docs" / "operator.md").read_text()
    named = set(re.findall(r"`((?:vllm:|seqr_)\w+)", page))
    text = own.http("ops").get("/metrics").text
    # A counter with labels has no sample before its first event, but always its family.
    known = {name for name, _ in scrape(own)} | {f"{name}_total" for name in re.findall(r"# TYPE (\S+)_total", text)}
    known |= set(re.findall(r"# TYPE (\S+) histogram", text))
    assert len(queries) > 10 and asked <= known, asked - known
    assert len(named) > 20 and named <= known, named - known


# Logs


@pytest.fixture
def logged() -> Iterator[Callable[[], str]]:
    """Everything that is logged meanwhile at any level, as JSON lines and as text."""
    outputs = []
    root = logging.getLogger()
    level, root_level = logging.DEBUG, root.level
    root.setLevel(level)
    for formatter in (JsonLines(), TextLines()):
        handler = logging.StreamHandler(io.StringIO())
        handler.setFormatter(formatter)
        handler.addFilter(lambda record: not record.name.startswith(NOT_THE_GATEWAYS))
        root.addHandler(handler)
        outputs.append(handler)
    yield lambda: "".join(handler.stream.getvalue() for handler in outputs)
    for handler in outputs:
        root.removeHandler(handler)
    root.setLevel(root_level)


def access_lines(text: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return [line for line in lines if line["logger"] == "inference_gateway.access"]


def test_one_log_line_tells_how_a_request_went(own: Running, logged: Callable[[], str]) -> None:
    answer = own.http("alice").post(CHAT, json=BODY, headers={"X-Request-Id": "my-own.id"})
    assert answer.headers["x-request-id"] == "my-own.id"
    [line] = access_lines(logged())
    assert (line["request_id"], line["user"], line["status"], line["route"]) == ("my-own.id", "alice", 200, CHAT)
    assert line["key"].startswith("key-") and line["reason"] in ("stop", "length")
    assert line["prompt_tokens"] == answer.json()["usage"]["prompt_tokens"]
    assert line["completion_tokens"] == answer.json()["usage"]["completion_tokens"]
    assert 0 <= line["queue_ms"] <= line["first_token_ms"] <= line["ms"]
    assert "request_id=my-own.id" in logged()


def test_a_request_id_is_made_where_none_or_a_malformed_one_is_given(own: Running) -> None:
    for given in ({}, {"X-Request-Id": "no spaces"}, {"X-Request-Id": "x" * 129}):
        for method, path in (("GET", "/v1/models"), ("GET", "/healthz"), ("POST", CHAT)):
            answer = own.http().request(method, path, headers=given)  # the last gets 401
            assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])


def test_no_log_line_holds_what_users_write_or_read_whatever_goes_wrong(
    own: Running, logged: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = own.http("alice")
    answer = client.post(CHAT, json=BODY | {"max_tokens": 30}).json()["choices"][0]["message"]["content"]
    client.post(CHAT, json=BODY | {"stream": True})
    client.post(CHAT, json=BODY | {"user": SECRET, "model": SECRET})
    client.post(CHAT, json=BODY | {"stop": [SECRET] * 9})
    client.post(f"{CHAT}?{SECRET}", content=SECRET.encode())
    client.get(f"/v1/models/{SECRET}")
    own.http().get("/v1/models", headers={"Authorization": f"Bearer {SECRET}"})
    own.http().get("/v1/models", headers={"X-Request-Id": SECRET})

    async def broken(_request: GenerationRequest) -> Any:
        raise RuntimeError(SECRET)
        yield

    monkeypatch.setattr(own.service.serving.engine, "generate", broken)
    failed = client.post(CHAT, json=BODY, headers={"X-Request-Id": "failed"})
    assert (failed.status_code, failed.headers["x-request-id"]) == (500, "failed")
    assert failed.json()["error"]["code"] == "internal_error"
    text = logged()
    assert access_lines(text)[-1]["status"] == 500
    assert "RuntimeError" in text and "in broken" in text  # it is told what happened and where
    for word in ("Marguerite", "Xylophone", "Quince"):
        assert word not in text
    assert len(answer) < 5 or answer not in text
    assert own.world.keys["alice"] not in text


def test_what_is_polled_all_the_time_is_logged_only_when_refused(own: Running, logged: Callable[[], str]) -> None:
    own.http("ops").get("/metrics")
    own.http().get("/healthz")
    own.http().get("/metrics")
    news = [line for line in access_lines(logged()) if line["level"] == "info"]
    assert [(line["route"], line["status"]) for line in news] == [("/metrics", 401)]
