"""The gateway under generated requests, and under those that an attacker would send by hand: never a 5xx.

``SEQR_FUZZ_EXAMPLES`` sets how many requests are generated per operation and kind; the default takes seconds.
"""

import json
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode, openapi
from schemathesis.core.result import Ok

from inference_gateway.api.openapi import schema
from tests.inference_gateway.conftest import Running, World, wait_until
from tests.inference_gateway.test_isolation_http import PUBLIC

EXAMPLES = int(os.environ.get("SEQR_FUZZ_EXAMPLES", "30"))
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "Where is the red boat?"}], "max_tokens": 1}
AnyCase = Case[Any]
CHAT = "/v1/chat/completions"


def assert_openai_shape(content: bytes) -> dict[str, Any]:
    error = json.loads(content)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert all(isinstance(error[name], str) and error[name] for name in ("message", "type", "code"))
    assert error["param"] is None or isinstance(error["param"], str)
    return dict(error)


def assert_sound(status: int, content: bytes) -> None:
    assert status < 500, content
    if status >= 400:
        assert_openai_shape(content)


def app_of(running: Running) -> FastAPI:
    app = running.server.config.app
    assert isinstance(app, FastAPI)
    return app


def post_paths(running: Running) -> list[str]:
    """Every route that takes a body."""
    return [path for path, item in schema(app_of(running))["paths"].items() if "post" in item]


def test_the_document_of_the_interface_needs_a_key_and_names_every_body(running: Running) -> None:
    assert running.http().get("/v1/openapi.json").status_code == 401
    document = running.http("carol").get("/v1/openapi.json").json()
    assert document == running.http("alice").get("/v1/openapi.json").json()
    assert document["openapi"].startswith("3.1") and CHAT in document["paths"]
    for path, item in document["paths"].items():
        for method, operation in item.items():
            assert operation.get("security") == (None if path in PUBLIC else [{"key": []}]), path
            assert ("requestBody" in operation) == (method == "post"), path
    assert not any(silo in json.dumps(document) for silo in ("alpha", "beta", "gamma"))


def answerable(case: AnyCase, sane: bool) -> AnyCase:
    """A ``sane`` case asks for the model that is here and for a short answer, to come past the first checks."""
    if sane and isinstance(case.body, dict):
        case.body["model"] = "tiny"
        for name in ("max_tokens", "max_completion_tokens", "n", "best_of"):
            value = case.body.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                case.body[name] = min(value, 4)
    return case


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_generated_requests_are_answered_or_refused_in_openais_shape(running: Running, mode: GenerationMode) -> None:
    headers = {"Authorization": f"Bearer {running.world.keys['alice']}"}
    statuses: set[int] = set()
    for result in openapi.from_dict(schema(app_of(running))).get_all_operations():
        assert isinstance(result, Ok)
        operation = result.ok()
        if mode is GenerationMode.NEGATIVE and not (operation.body or list(operation.iter_parameters())):
            continue  # nothing there that could be wrong

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode), sane=st.booleans())
        def attack(case: AnyCase, sane: bool) -> None:
            response = answerable(case, sane).call(base_url=running.url, headers=headers, timeout=30)
            if case.method.upper() == "HEAD":  # which has no body to be sound
                assert response.status_code < 500 and not response.content
            else:
                assert_sound(response.status_code, response.content)
            statuses.add(response.status_code)

        try:
            attack()
        except Unsatisfiable:  # nothing in a path can be wrong: any text may stand there
            assert not operation.body
    assert statuses - {200} if mode is GenerationMode.NEGATIVE else 200 in statuses


def raw(running: Running, path: str, content: bytes, **headers: str) -> httpx.Response:
    return running.http("alice").post(path, content=content, headers={"content-type": "application/json"} | headers)


CHAT_JSON = json.dumps(BODY).encode()
BODIES = {
    "ten megabytes": (b" " * 10_000_000, 413),
    "ten megabytes of text": (json.dumps(BODY | {"user": "x" * 10_000_000}).encode(), 413),
    "nothing": (b"", 400),
    "half a document": (CHAT_JSON[:-10], 400),
    "two documents": (CHAT_JSON * 2, 400),
    "latin 1": ('{"model": "tïny"}'.encode("latin-1"), 400),
    "a byte order mark": (b"\xef\xbb\xbf" + CHAT_JSON, 400),
    "utf-16": (CHAT_JSON.decode().encode("utf-16"), 400),
    "a lone surrogate": (b'{"model": "\\udfff"}', 400),
    "arrays in arrays": (b"[" * 200_000 + b"]" * 200_000, 400),
    "objects in objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 400),
    "nesting in a known field": (b'{"model":"tiny","messages":' + b"[" * 900 + b"]" * 900 + b"}", 400),
    "not a number": (b'{"model":"tiny","temperature":NaN}', 400),
    "infinity": (b'{"model":"tiny","temperature":-Infinity}', 400),
    "a float beyond all": (CHAT_JSON[:-1] + b',"temperature":1e999}', 400),
    "an integer of 5,000 digits": (CHAT_JSON[:-1] + b',"seed":' + b"9" * 5000 + b"}", 400),
    "an integer of 400 digits": (CHAT_JSON[:-1] + b',"seed":' + b"9" * 400 + b"}", 400),
    "a huge number of tokens": (CHAT_JSON.replace(b": 1}", b": " + b"9" * 30 + b"}"), 400),
    "an array": (b"[1]", 400),
    "a string": (b'"tiny"', 400),
    "null": (b"null", 400),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_broken_body_is_refused_on_every_route(running: Running, name: str) -> None:
    content, status = BODIES[name]
    for path in post_paths(running):
        response = raw(running, path, content)
        assert response.status_code == status, (path, response.text[:300])
        assert_openai_shape(response.content)


def test_a_name_that_is_given_twice_is_refused(running: Running) -> None:
    # A filter before the gateway may read the first, the gateway the last: neither is what was checked.
    twice = b'{"seqr":{"silos":["beta"]},' + CHAT_JSON[1:-1] + b',"seqr":{"silos":["alpha"]}}'
    response = raw(running, CHAT, twice)
    assert response.status_code == 400 and assert_openai_shape(response.content)["code"] == "invalid_json"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/xml", "", "x" * 500])
def test_any_content_type_is_read_as_json_or_refused(running: Running, kind: str) -> None:
    response = raw(running, CHAT, CHAT_JSON, **{"content-type": kind})
    assert response.status_code in (200, 400, 415)
    assert raw(running, CHAT, b"model=tiny&messages=x", **{"content-type": kind}).status_code in (400, 415)


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "nonsense"])
def test_a_compressed_body_is_not_unpacked(running: Running, encoding: str) -> None:
    response = raw(running, CHAT, b"\x1f\x8b\x08\x00" + b"\x00" * 100, **{"content-encoding": encoding})
    assert response.status_code in (400, 415)
    assert_openai_shape(response.content)


METHODS = ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "POST", "PROPFIND", "HEAD")


@pytest.mark.parametrize("method", METHODS)
def test_a_wrong_method_is_405_on_every_route(running: Running, method: str) -> None:
    for path, item in schema(app_of(running))["paths"].items():
        if method.lower() in item:
            continue
        response = running.http("alice").request(method, path.replace("{name}", "tiny"))
        assert response.status_code == 405, path
        assert response.headers["allow"]
        if method != "HEAD":
            assert assert_openai_shape(response.content)["code"] == "http_405"


@pytest.mark.parametrize(
    "path",
    ["/v1", "/v1/", "/v2/models", "/v1/chat/completions/", "//v1/models", "/v1/../healthz", "/%00", "/v1/models/%ff",
     "/v1/models/" + "x" * 5000, "/v1/models/silo:%2e%2e/", "/openapi.json", "/docs", "/v1/files"],
)  # fmt: skip
def test_a_path_that_is_not_there_is_404_in_openais_shape(running: Running, path: str) -> None:
    status, _, body = talk(
        running, f"GET {path} HTTP/1.1\r\nHost: x\r\n{key(running)}Connection: close\r\n\r\n".encode()
    )
    assert status in (404, 307), body
    if status == 404:
        assert_openai_shape(body)


def key(running: Running, user: str = "alice") -> str:
    return f"Authorization: Bearer {running.world.keys[user]}\r\n"


def talk(running: Running, data: bytes, seconds: float = 20) -> tuple[int, dict[str, str], bytes]:
    """Send bytes as they are; returns the answer's status, headers and body."""
    port = int(running.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        connection.sendall(data)
        parts = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = parts.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    return int(lines[0].split()[1]), headers, body


KEYS = {
    "no scheme": b"Authorization: nonsense",
    "an empty key": b"Authorization: Bearer ",
    "another scheme": b"Authorization: Basic YTpi",
    "bytes that are no text": b"Authorization: Bearer \xff\xfe\xfd",
    "a very long key": b"Authorization: Bearer " + b"x" * 30_000,
    "quotes and statements": b"Authorization: Bearer seqr_'; DROP TABLE api_keys; --",
    "two keys": b"Authorization: Bearer a\r\nAuthorization: Bearer b",
    "a scheme twice": b"Authorization: Bearer Bearer x",
}


@pytest.mark.parametrize("name", KEYS)
def test_a_header_that_is_no_key_is_401(running: Running, name: str) -> None:
    request = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + KEYS[name] + b"\r\n\r\n"
    status, headers, body = talk(running, request)
    assert status == 401 and headers["www-authenticate"] == "Bearer"
    assert assert_openai_shape(body)["type"] == "authentication_error"


JUNK = {
    "x-request-id": ["a\x01b", "ü", "x" * 20_000, "${jndi:ldap://x}", "../../etc/passwd"],
    "content-length": ["-1", "1e3", "0x10", "9" * 30, "1, 2"],
    "transfer-encoding": ["gzip", "chunked, chunked", "identity"],
    "accept": ["image/png", "x" * 20_000],
    "host": ["", "a b", "evil.example"],
    "expect": ["200-maybe"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in JUNK.items() for value in values])
def test_junk_in_a_header_is_ignored_or_refused(running: Running, name: str, value: str) -> None:
    fields = {"host": "x", "content-length": str(len(CHAT_JSON))} | {name: value}
    if name == "transfer-encoding":
        del fields["content-length"]
    head = "".join(f"{field}: {text}\r\n" for field, text in fields.items())
    status, headers, _ = talk(
        running, f"POST {CHAT} HTTP/1.1\r\n{key(running)}Connection: close\r\n{head}\r\n".encode() + CHAT_JSON
    )
    assert status < 500
    assert headers.get("x-request-id", "") != value


def test_a_body_that_trickles_in_takes_no_place_from_the_others(running: Running) -> None:
    connections = []
    port = int(running.url.rpartition(":")[2])
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\n{key(running)}Content-Length: 1000\r\n\r\n".encode()
    try:
        for _ in range(64):
            connection = socket.create_connection(("127.0.0.1", port), timeout=5)
            connection.sendall(head + b'{"model"')
            connections.append(connection)
        assert running.http("alice").post(CHAT, json=BODY).status_code == 200
        info = running.service.serving.engine.info()
        assert (info.running, info.waiting) == (0, 0)
    finally:
        for connection in connections:
            connection.close()


def test_a_client_that_leaves_with_its_body_half_sent_is_499_and_no_defect(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "inference_gateway.access")

    def told() -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = [getattr(record, "fields", {}) for record in caplog.records]
        return [line for line in lines if line.get("request_id") == "half-sent"]

    port = int(running.url.rpartition(":")[2])
    lines = (f"POST {CHAT} HTTP/1.1", "Host: x", "X-Request-Id: half-sent", f"{key(running)}Content-Length: 1000")
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall("\r\n".join((*lines, "", '{"model"')).encode())
    wait_until(lambda: bool(told()))
    assert [(line["status"], line["route"]) for line in told()] == [(499, CHAT)]
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_a_body_that_takes_too_long_is_408_and_the_connection_is_closed(
    make_world: Callable[[Path], World], tmp_path: Path
) -> None:
    world = make_world(tmp_path / "gateway")
    world.settings = world.settings.model_copy(update={"max_body_seconds": 0.2})
    server = Running(world).start()
    try:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\n{key(server)}Content-Length: 1000\r\n\r\n".encode()
        status, _, body = talk(server, head + b'{"model"')  # returns because the gateway closes
        assert (status, assert_openai_shape(body)["code"]) == (408, "body_too_slow")
    finally:
        server.stop()
