"""Silos reach /v1/fleet/ of the SuperLink and nothing else, whatever they write into the path."""

import asyncio
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from coordinator.fleet_proxy import BODY_LIMIT_BYTES, FleetProxy

ROOT = Path(__file__).parents[2]

REFUSED = [
    "/v1/control/list-runs",
    "/v1/control/start-run",
    "/v1/runtime/acquire-task",
    "/v1/fleet",
    "/v1/fleet/",
    "/v1/fleet//pull-messages",
    "/v1/fleet/../control/start-run",
    "/v1/fleet/%2e%2e/control/start-run",
    "/v1/fleet/pull-messages/../../control/start-run",
    "/v1/fleet/pull-messages%2f..%2fcontrol",
    "/v1/fleet/pull-messages;x",
    "/V1/FLEET/PULL-MESSAGES",
    "//v1/fleet/pull-messages",
    "/v1/fleet/pull-messages\n",
    "/docs",
    "/openapi.json",
    "/",
]


class SuperLink(httpx.AsyncBaseTransport):
    """Stands for the SuperLink: remembers what reached it and answers with the body it got."""

    def __init__(self) -> None:
        self.seen: list[httpx.Request] = []
        self.bodies: list[bytes] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.seen.append(request)
        self.bodies.append(await request.aread())
        return httpx.Response(200, headers={"x-flower": "yes"}, stream=httpx.ByteStream(self.bodies[-1][::-1]))


def call(
    path: str, method: str = "POST", body: bytes = b"", query: bytes = b"", headers: dict[bytes, bytes] | None = None
) -> tuple[int, bytes, SuperLink]:
    superlink = SuperLink()
    proxy = FleetProxy("https://superlink:1", Path("unused"), transport=superlink)
    sent: list[Any] = []
    parts = [body[at : at + 1_000_000] for at in range(0, len(body), 1_000_000)] or [b""]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(message: Any) -> None:
        sent.append(message)

    given = {b"content-length": str(len(body)).encode(), **(headers or {})}
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query,
        "headers": list(given.items()),
    }
    asyncio.run(proxy(scope, receive, send))
    return sent[0]["status"], b"".join(m.get("body", b"") for m in sent[1:]), superlink


@pytest.mark.parametrize("path", REFUSED)
def test_anything_but_a_fleet_call_is_not_found_and_never_reaches_the_superlink(path: str) -> None:
    status, body, superlink = call(path)
    assert (status, body, superlink.seen) == (404, b"", [])


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "HEAD"])
def test_other_methods_are_not_found(method: str) -> None:
    assert call("/v1/fleet/pull-messages", method)[0] == 404


def test_query_strings_are_not_found() -> None:
    assert call("/v1/fleet/pull-messages", query=b"x=1")[0] == 404


def test_every_call_of_the_installed_flower_passes_unchanged() -> None:
    import inspect

    from flwr.supernode import fleet_http_client

    calls = re.findall(r'path="(/[^"]+)"', inspect.getsource(fleet_http_client))
    assert len(calls) >= 12
    for path in calls:
        status, body, superlink = call(path, body=b"ab" * 700_000, headers={b"x-signature": b"s", b"host": b"outside"})
        assert (status, body) == (200, b"ba" * 700_000)
        assert superlink.seen[0].url.path == path and superlink.bodies[0] == b"ab" * 700_000
        assert superlink.seen[0].headers["x-signature"] == "s"
        assert superlink.seen[0].headers["host"] == "superlink:1"


def test_body_larger_than_the_limit_is_refused_by_its_declared_length() -> None:
    status, _, superlink = call(
        "/v1/fleet/push-object", headers={b"content-length": str(BODY_LIMIT_BYTES + 1).encode()}
    )
    assert (status, superlink.seen) == (413, [])


def test_body_that_outgrows_the_limit_while_read_is_refused() -> None:
    body = bytes(BODY_LIMIT_BYTES + 1)
    status, _, superlink = call("/v1/fleet/push-object", body=body, headers={b"content-length": b"5"})
    assert (status, superlink.seen) == (413, [])


def test_unreachable_superlink_is_a_bad_gateway() -> None:
    proxy = FleetProxy("https://127.0.0.1:1", Path("unused"), transport=httpx.AsyncHTTPTransport())
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    path = "/v1/fleet/pull-messages"
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
    asyncio.run(proxy({**scope, "headers": []}, receive, send))
    assert sent[0]["status"] == 502
