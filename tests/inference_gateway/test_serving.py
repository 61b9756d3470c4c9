"""What the gateway's server makes of clients that do not come to the point, with either of uvicorn's HTTP protocols."""

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from inference_gateway import serving
from inference_gateway.serving import Bounded, Protocol, config_of
from inference_gateway.settings import Settings
from tests.inference_gateway.conftest import wait_until

WHOLE = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc"
PATIENCE_S = 0.4
MOST = 3


class WithH11(Bounded, H11Protocol):
    max_connections = MOST


class WithHttptools(Bounded, HttpToolsProtocol):
    max_connections = MOST


async def slow_echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Sends the body back, some time after it has arrived."""
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message["body"], message["more_body"]
    await asyncio.sleep(2 * PATIENCE_S)
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(params=[WithH11, WithHttptools])
def address(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    monkeypatch.setattr(serving, "HEADERS_S", PATIENCE_S)
    settings = Settings(
        directory=tmp_path,
        coordinator_url="http://coordinator",
        coordinator_public_key="none",
        policy_database_url="sqlite://",
        port=0,
        max_connections=MOST,
    )
    config = config_of(slow_echo, settings)
    served = config.http
    assert isinstance(served, type) and issubclass(served, Protocol) and served.max_connections == MOST
    config.http = request.param
    config.lifespan = "off"
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield server.servers[0].sockets[0].getsockname()
    finally:
        server.should_exit = True
        thread.join(20)


def opened(address: tuple[str, int]) -> socket.socket:
    return socket.create_connection(address, timeout=20)


def answer(connection: socket.socket) -> bytes:
    received = b""
    while not received.endswith(b"abc"):
        more = connection.recv(1000)
        assert more, "the connection was closed"
        received += more
    return received


@pytest.mark.parametrize("sent", [b"", b"G", WHOLE[:30]])
def test_a_connection_without_whole_headers_is_closed(address: tuple[str, int], sent: bytes) -> None:
    with opened(address) as connection:
        connection.sendall(sent)
        assert connection.recv(1000) == b""


def test_a_second_request_has_no_longer_for_its_headers(address: tuple[str, int]) -> None:
    with opened(address) as connection:
        connection.sendall(WHOLE)
        assert answer(connection).startswith(b"HTTP/1.1 200 OK")
        connection.sendall(WHOLE[:30])
        assert connection.recv(1000) == b""


def test_headers_that_come_byte_by_byte_earn_no_time(address: tuple[str, int]) -> None:
    with opened(address) as connection:
        connection.settimeout(PATIENCE_S / 10)
        connection.sendall(b"GET / HTTP/1.1\r\nA: ")
        for _ in range(500):
            try:
                assert connection.recv(1000) == b""
                return
            except TimeoutError:
                connection.sendall(b"a")
            except ConnectionError:
                return
    raise AssertionError("the connection is still open")


def test_a_body_an_answer_and_an_idle_connection_may_take_longer(address: tuple[str, int]) -> None:
    with opened(address) as connection:
        for _ in range(2):
            connection.sendall(WHOLE[:-2])
            threading.Event().wait(2 * PATIENCE_S)
            connection.sendall(WHOLE[-2:])
            assert answer(connection).startswith(b"HTTP/1.1 200 OK")
            threading.Event().wait(2 * PATIENCE_S)


def test_a_connection_too_many_is_refused_at_once_and_another_is_taken_when_one_has_gone(
    address: tuple[str, int],
) -> None:
    with opened(address) as first, opened(address), opened(address):
        first.sendall(WHOLE)
        with opened(address) as refused:
            head, _, body = b"".join(iter(lambda: refused.recv(1000), b"")).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 Service Unavailable\r\n") and b"\r\nretry-after: 1" in head
        error = json.loads(body)["error"]
        assert error["code"] == "overloaded"
        assert error["message"] == "this gateway has as many connections as it takes; try again later"
        assert answer(first).startswith(b"HTTP/1.1 200 OK")
    for _ in range(100):  # until the server has seen them go
        with opened(address) as connection, suppress(ConnectionError):
            connection.sendall(WHOLE)
            if connection.recv(1000).startswith(b"HTTP/1.1 200 OK"):
                return
    raise AssertionError("no connection is taken any more")
