"""Whatever a body holds, the answer is OpenAI's error with a code and a sentence, and never a 5xx."""

import json
from typing import Any

import openai
import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts

from tests.inference_gateway.conftest import HOW, Running

ROUTES = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
COMPLETION = {"model": "tiny", "prompt": "Hello", "max_tokens": 2}


def post(running: Running, route: str, content: Any) -> tuple[int, dict[str, Any]]:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    response = running.http("alice").post(route, content=body, headers={"content-type": "application/json"})
    return response.status_code, response.json().get("error", {})


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("content", "status", "code", "message"),
    [
        (b"", 400, "invalid_json", "the body is not valid JSON in UTF-8"),
        (b"{not json", 400, "invalid_json", "the body is not valid JSON in UTF-8"),
        (b'{"model": "\xff\xfe"}', 400, "invalid_json", "the body is not valid JSON in UTF-8"),
        (b'{"model": "\\ud800"}', 400, "invalid_json", "the body is not valid JSON in UTF-8"),
        (b'{"model": NaN}', 400, "invalid_json", "the body is not valid JSON in UTF-8"),
        (b'{"temperature": Infinity}', 400, "invalid_json", "the body is not valid JSON in UTF-8"),
        (b'{"temperature": 1e999}', 400, "invalid_json", "the body is not valid JSON in UTF-8"),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400, "invalid_json", "the body is not valid JSON in UTF-8"),
        (b"[" * 100_000, 400, "invalid_json", "the body is not valid JSON in UTF-8"),
        (b"[" * 80 + b"]" * 80, 400, "invalid_json", "the body is nested more than 64 levels deep"),
        (b"[]", 400, "invalid_value", "the body: "),
        (b"null", 400, "invalid_value", "the body: "),
        (b'"x"', 400, "invalid_value", "the body: "),
        (b"{}", 400, "missing_parameter", " is missing"),
        (b"x" * (1024 * 1024 + 1), 413, "body_too_large", "the body is larger than the 1048576 bytes"),
        (b"x" * (10 * 1024 * 1024), 413, "body_too_large", "the body is larger than the 1048576 bytes"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_a_broken_body_is_named(
    running: Running, route: str, content: bytes, status: int, code: str, message: str
) -> None:
    got, error = post(running, route, content)
    assert (got, error["code"]) == (status, code)
    assert message in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_a_body_without_a_length_is_cut_off_too(running: Running) -> None:
    parts = (b"x" * 65536 for _ in range(20))
    response = running.http("alice").post("/v1/chat/completions", content=parts)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


HUGE = 10**30


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": "five"},
        {"max_tokens": 2.5},
        {"max_tokens": True},
        {"max_tokens": HUGE},
        {"max_tokens": -HUGE},
        {"temperature": "hot"},
        {"temperature": True},
        {"temperature": HUGE},
        {"top_p": None, "top_k": HUGE},
        {"seed": HUGE},
        {"n": HUGE},
        {"stop": {}},
        {"stop": [[]]},
        {"stop": HUGE},
        {"stop": "x" * 2000},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": "5"},
        {"logit_bias": [1]},
        {"logit_bias": {"5": "much"}},
        {"logit_bias": {"٣": 1}},
        {"logit_bias": {"9" * 200: 1}},
        {"stream": "yes"},
        {"stream_options": [], "stream": True},
        {"user": 5},
        {"model": 5},
        {"model": ""},
        {"model": None},
        {"seqr": []},
        {"seqr": {"silos": "alpha"}},
        {"seqr": {"silos": [""]}},
        {"seqr": {"attribution": "yes"}},
    ],
    ids=lambda value: repr(value)[:40],
)
@pytest.mark.parametrize("whole", [CHAT, COMPLETION], ids=["chat", "completion"])
def test_a_value_of_the_wrong_kind_is_refused_by_name(
    running: Running, whole: dict[str, Any], wrong: dict[str, Any]
) -> None:
    route = "/v1/chat/completions" if whole is CHAT else "/v1/completions"
    status, error = post(running, route, whole | wrong)
    assert (status, error["code"], error["type"]) == (400, "invalid_value", "invalid_request_error")
    assert error["param"].split(".")[0] == list(wrong)[-1 if "top_k" in wrong else 0]
    assert len(error["message"]) < 500


def test_unusual_text_is_answered_like_any_other(running: Running) -> None:
    for text in ("\x00", "\u202e", "👩‍👩‍👧", "<|im_end|>", "{{ 7 * 7 }}", "\ufffd", " "):
        assert post(running, "/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": text}]})[0] == 200
        assert post(running, "/v1/completions", COMPLETION | {"prompt": text})[0] == 200


def test_methods_and_routes_that_do_not_exist_have_the_errors_shape(running: Running) -> None:
    assert running.http("alice").get("/v1/chat/completions").json()["error"]["code"] == "http_405"
    missing = running.http("alice").post("/v1/embeddings", json={})
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "http_404"


def test_a_slash_at_the_end_sends_nobody_elsewhere(running: Running) -> None:
    app = running.server.config.app
    assert isinstance(app, FastAPI)
    paths = {str(route.path_format) for route in iter_route_contexts(app.routes)}
    assert {"/v1/chat/completions", "/tokenize", "/healthz", "/auth/session"} <= paths
    for path in paths - {"/"}:
        for method in ("GET", "POST"):
            response = running.http().request(method, f"{path}/", headers={"Host": "evil.example"})
            assert response.status_code >= 400 and "location" not in response.headers, path


def test_no_answer_is_kept_on_the_way_but_the_pages_own(running: Running) -> None:
    client = running.http("alice")
    for path in ("/v1/models", "/v1/models/tiny", "/v1/openapi.json", "/v1/nothing", "/auth/session", "/readyz"):
        assert client.get(path).headers["cache-control"] == "no-store", path
    assert client.post("/v1/chat/completions", json=CHAT).headers["cache-control"] == "no-store"
    assert client.post("/v1/chat/completions", json={}).headers["cache-control"] == "no-store"
    assert client.post("/v1/chat/completions", json=CHAT | {"stream": True}).headers["cache-control"] == "no-store"
    assert running.http().get("/v1/models").headers["cache-control"] == "no-store"
    for path in ("/", "/playground/main.js"):
        assert client.get(path).headers["cache-control"] == "no-cache", path


def test_a_key_for_another_scope_is_refused(running: Running) -> None:
    running.world.policy.create_user("auditor", ["auditor"], **HOW)
    key = running.world.policy.create_key("auditor", ["audit"], **HOW).secret
    for route in ROUTES:
        response = running.http().post(route, json=CHAT, headers={"Authorization": f"Bearer {key}"})
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["type"]) == (403, "scope_missing", "permission_error")


def test_the_openai_client_raises_its_own_errors(running: Running) -> None:
    client = running.openai("alice")
    with pytest.raises(openai.BadRequestError, match="temperature") as refused:
        client.chat.completions.create(**{**CHAT, "temperature": 9})  # type: ignore[call-overload]
    assert refused.value.param == "temperature" and refused.value.code == "invalid_value"
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.chat.completions.create(**{**CHAT, "model": "gpt-4"})  # type: ignore[call-overload]
    stranger = openai.OpenAI(base_url=f"{running.url}/v1", api_key="nonsense", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.chat.completions.create(**CHAT)  # type: ignore[call-overload]
    with pytest.raises(openai.BadRequestError, match="context holds 512"):
        client.completions.create(model="tiny", prompt="x" * 600)
