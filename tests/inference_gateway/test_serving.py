"""What the gateway's server makes of clients that do not come to the point, with either of uvicorn's HTTP protocols."""

import asyncio
import json
import socket
import ssl
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from coordinator.certs import make_certificates
from inference_gateway import serving
from inference_gateway.serving import Bounded, Protocol, config_of
from inference_gateway.settings import Settings
from tests.inference_gateway.conftest import wait_until

WHOLE = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc"
PATIENCE_S = 0.4
SEND_S = 1.0
MOST = 3
LARGE = 12 * 1024 * 1024  # more than the systems on both sides keep


class WithH11(Bounded, H11Protocol):
    max_connections = MOST
    send_timeout = SEND_S


class WithHttptools(Bounded, HttpToolsProtocol):
    max_connections = MOST
    send_timeout = SEND_S


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


class LongAnswers:
    """/whole is a large answer at once and /stream one piece by piece without an end; anything else is short.

    ``streams``: how many streams are being written.
    """

    def __init__(self) -> None:
        self.streams = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        responses = {"/whole": Response(b"x" * LARGE), "/stream": StreamingResponse(self._pieces())}
        await responses.get(scope["path"], Response(b"abc"))(scope, receive, send)

    async def _pieces(self) -> AsyncGenerator[bytes]:
        self.streams += 1
        try:
            while True:
                yield b"x" * 1000
                await asyncio.sleep(0)
        finally:
            self.streams -= 1


@contextmanager
def served(app: Any, protocol: type[Bounded], directory: Path, tls: bool = False) -> Iterator[uvicorn.Server]:
    settings = Settings(
        directory=directory,
        coordinator_url="http://coordinator",
        coordinator_public_key="none",
        policy_database_url="sqlite://",
        port=0,
        max_connections=MOST,
        send_timeout_seconds=SEND_S,
        ssl_certfile=directory / "server.crt" if tls else None,
        ssl_keyfile=directory / "server.key" if tls else None,
    )
    config = config_of(app, settings)
    bounded = config.http
    assert isinstance(bounded, type) and issubclass(bounded, Protocol)
    assert (bounded.max_connections, bounded.send_timeout) == (MOST, SEND_S)
    config.http, config.lifespan = protocol, "off"
    config.loop = "asyncio"  # as the gateway's own
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join(20)


def address_of(server: uvicorn.Server) -> tuple[str, int]:
    host, port = server.servers[0].sockets[0].getsockname()
    return host, port


@pytest.fixture(params=[WithH11, WithHttptools])
def address(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    monkeypatch.setattr(serving, "HEADERS_S", PATIENCE_S)
    with served(slow_echo, request.param, tmp_path) as server:
        yield address_of(server)


class Readers:
    """Clients that keep almost nothing of an answer which they do not read, over TLS or not."""

    def __init__(self, app: LongAnswers, server: uvicorn.Server, tls: bool):
        self.app = app
        self.connections = server.server_state.connections
        self._address = address_of(server)
        self._tls = tls

    def ask(self, path: str) -> socket.socket:
        connection = socket.socket()
        connection.settimeout(20)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(self._address)
        if self._tls:
            unverified = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
            connection = unverified.wrap_socket(connection)
        connection.sendall(b"GET %s HTTP/1.1\r\nHost: a\r\n\r\n" % path.encode())
        return connection

    def status(self) -> bytes:
        """The status line that a further client gets."""
        with self.ask("/") as connection:
            return connection.recv(1000).partition(b"\r\n")[0]


@pytest.fixture(
    params=[(WithH11, False), (WithHttptools, False), (WithHttptools, True)], ids=["h11", "httptools", "tls"]
)
def readers(request: Any, tmp_path: Path) -> Iterator[Readers]:
    protocol, tls = request.param
    if tls:
        make_certificates(tmp_path)
    app = LongAnswers()
    with served(app, protocol, tmp_path, tls) as server:
        yield Readers(app, server, tls)


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


@pytest.mark.parametrize("path", ["/whole", "/stream"])
def test_readers_that_take_nothing_lose_their_connections_and_others_are_served(readers: Readers, path: str) -> None:
    with ExitStack() as open_ones:
        stalled = [open_ones.enter_context(readers.ask(path)) for _ in range(MOST)]
        wait_until(lambda: readers.app.streams == (MOST if path == "/stream" else 0))
        with suppress(ConnectionError):  # a refusal may come before the question
            assert readers.status().startswith(b"HTTP/1.1 503")
        wait_until(lambda: _without_error(readers.status).startswith(b"HTTP/1.1 200"))
        wait_until(lambda: not readers.connections)  # before anything is read: who reads keeps its connection
        for connection in stalled:
            with suppress(ConnectionError, ssl.SSLError):
                while connection.recv(1 << 20):
                    pass
        wait_until(lambda: readers.app.streams == 0)


def _without_error(status: Any) -> bytes:
    try:
        return bytes(status())
    except ConnectionError:
        return b""


def test_a_reader_that_reads_slowly_gets_all_of_it_and_may_then_be_idle(readers: Readers) -> None:
    with readers.ask("/whole") as connection:
        received = b""
        until = time.monotonic() + 4 * SEND_S
        while time.monotonic() < until:
            received += connection.recv(4096)
            time.sleep(SEND_S / 10)
        head, _, rest = received.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        left = LARGE - len(rest)
        assert left > LARGE / 2
        while left:
            more = connection.recv(1 << 20)
            assert more, "the connection was closed"
            left -= len(more)
        time.sleep(2.5 * SEND_S)
        connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")


def test_a_connection_of_which_the_system_tells_nothing_counts_as_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        client.setblocking(False)
        with suppress(BlockingIOError):
            while client.send(b"x" * LARGE):
                pass
        assert serving.taken(client) is not None
        monkeypatch.setattr(serving, "TCP_INFO_OPTION", None)
        assert serving.taken(client) is None
        monkeypatch.undo()
    assert serving.taken(client) is None
