"""What one body or one user can cost the others: no errors without end, no event loop, no threads but their own."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, ValidationError

from inference_gateway import turns
from inference_gateway.api import body
from inference_gateway.api.chat_schema import ChatRequest
from inference_gateway.api.text_schema import CompletionRequest, DetokenizeRequest, TokenizeMessages
from tests.inference_gateway.conftest import Running, World, wait_until

MANY = 5000
TURN = {"role": "user", "content": "Hello"}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [TURN]}
COMPLETION = {"model": "tiny", "prompt": "Hello"}
FULL_OF_MISTAKES: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "stop": (ChatRequest, CHAT | {"stop": [-1] * MANY}),
    "stop of a completion": (CompletionRequest, COMPLETION | {"stop": [-1] * MANY}),
    "stop_token_ids": (ChatRequest, CHAT | {"stop_token_ids": [-1] * MANY}),
    "logit_bias": (ChatRequest, CHAT | {"logit_bias": {str(token): 101 for token in range(MANY)}}),
    "silos": (ChatRequest, CHAT | {"seqr": {"silos": [1] * MANY}}),
    "messages": (ChatRequest, CHAT | {"messages": [{"role": 1, "content": "a"}] * MANY}),
    "messages to tokenize": (TokenizeMessages, {"messages": [{"role": 1, "content": "a"}] * MANY}),
    "parts": (ChatRequest, CHAT | {"messages": [TURN | {"content": [1] * MANY}]}),
    "calls": (ChatRequest, CHAT | {"messages": [TURN | {"tool_calls": [1] * MANY}]}),
    "tools": (ChatRequest, CHAT | {"tools": [1] * MANY}),
    "texts": (CompletionRequest, COMPLETION | {"prompt": ["a", *[1] * MANY]}),
    "tokens": (CompletionRequest, COMPLETION | {"prompt": [-1] * MANY}),
    "lists of tokens": (CompletionRequest, COMPLETION | {"prompt": [[-1] * MANY]}),
    "tokens to text": (DetokenizeRequest, {"tokens": [-1] * MANY}),
    "unknown names in every turn": (ChatRequest, CHAT | {"messages": [TURN | dict.fromkeys("abcde", 1)] * MANY}),
}


@pytest.mark.parametrize("name", FULL_OF_MISTAKES)
def test_a_body_full_of_mistakes_is_refused_after_a_few_of_them(name: str) -> None:
    model, document = FULL_OF_MISTAKES[name]
    with pytest.raises(ValidationError) as refused:
        model.model_validate(document)
    assert refused.value.error_count() < 10


@pytest.mark.parametrize("where", ["the body", "a message"])
def test_an_object_of_thousands_of_names_is_refused_as_a_whole(running: Running, where: str) -> None:
    unknown = {f"name-{number}": 1 for number in range(MANY)}
    sent = CHAT | unknown if where == "the body" else CHAT | {"messages": [TURN | unknown]}
    response = running.http("alice").post("/v1/chat/completions", json=sent)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "unknown_parameter")
    members = MANY + 2
    assert error["message"] == f"an object in the body has {members} members, more than this gateway knows"


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
def test_a_large_body_is_not_read_on_the_event_loop(
    running: Running, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    on_the_loop: list[bool] = []

    def parse(data: bytes, real: Callable[[bytes], Any] = body.parse) -> Any:
        on_the_loop.append(threading.current_thread() is running._thread)
        return real(data)

    monkeypatch.setattr(body, "parse", parse)
    for tokens in (1, 100_000):
        content = json.dumps({"tokens": [-1] * tokens}).encode()
        assert running.http("alice").post(route, content=content).status_code == 400
    assert on_the_loop == [True, False]


class SlowTokenizer:
    """Takes ``text`` and no other until it is released, and knows how many it has in hand at once."""

    def __init__(self, real: Any, text: str):
        self._real = real
        self._text = text
        self._lock = threading.Lock()
        self.released = threading.Event()
        self.at_once = self.most_at_once = 0

    def __call__(self, text: str, **options: Any) -> Any:
        if text == self._text:
            with self._lock:
                self.at_once += 1
                self.most_at_once = max(self.most_at_once, self.at_once)
            self.released.wait(30)
            with self._lock:
                self.at_once -= 1
        return self._real(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@pytest.fixture
def own(make_world: Callable[[Path], World], tmp_path: Path) -> Iterator[Running]:
    server = Running(make_world(tmp_path / "gateway")).start()
    try:
        server.await_adapters()
        yield server
    finally:
        server.stop()


@pytest.mark.parametrize("route", ["/tokenize", "/v1/completions"])
def test_a_user_whose_prompts_take_long_takes_no_threads_from_others(own: Running, route: str) -> None:
    serving = own.service.serving
    slow = SlowTokenizer(serving.tokenizer, "slow")
    own.service.instead = replace(serving, tokenizer=slow)
    sent = {"model": "tiny", "prompt": "slow"} | ({"max_tokens": 1} if route == "/v1/completions" else {})
    with ThreadPoolExecutor(41) as pool:
        try:
            asked = [pool.submit(own.http("alice").post, route, json=sent) for _ in range(41)]
            wait_until(lambda: slow.at_once == 1)
            # Anyio has 40 threads: with one for each of these nobody else could be told anything.
            for _ in range(3):
                assert own.http().get("/readyz").status_code == 200
                assert own.http("bob").get("/v1/models").status_code == 200
                assert own.http("bob").post("/tokenize", json={"prompt": "fast"}).json()["count"] > 0
            assert not any(one.done() and one.result().status_code == 200 for one in asked)
        finally:
            slow.released.set()
        assert {one.result().status_code for one in asked} <= {200, 429, 503}
    assert slow.most_at_once == 1


def assert_too_many(response: httpx.Response) -> None:
    error = response.json()["error"]
    assert (response.status_code, error["code"], response.headers["retry-after"]) == (503, "overloaded", "1")
    assert error["message"] == "too many of your requests wait to be read; try again in a moment"


@pytest.mark.parametrize("told", [True, False], ids=["with a length", "without a length"])
def test_a_user_has_no_more_large_bodies_read_at_once_than_there_is_room_for(
    own: Running, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    """A body without a length counts as the largest there may be."""
    text = json.dumps({"prompt": "a" * 100_000}).encode()
    room, size = 3, len(text) if told else own.world.settings.max_body_bytes
    monkeypatch.setattr(turns, "READING", room * size)
    go_on, lock, begun = threading.Event(), threading.Lock(), []

    def parse(data: bytes, real: Callable[[bytes], Any] = body.parse) -> Any:
        if data == text:
            with lock:
                begun.append(data)
            go_on.wait(30)
        return real(data)

    monkeypatch.setattr(body, "parse", parse)

    def ask(_number: int) -> httpx.Response:
        return own.http("alice").post("/tokenize", content=text if told else iter([text]))

    with ThreadPoolExecutor(12) as pool:
        try:
            asked = [pool.submit(ask, number) for number in range(12)]
            wait_until(lambda: sum(one.done() for one in asked) == 12 - room)
            for one in asked:
                if one.done():
                    assert_too_many(one.result())
            assert own.http("bob").post("/tokenize", json={"prompt": "b" * 50_000}).json()["count"] > 0
            assert len(begun) == 1
        finally:
            go_on.set()
        assert sorted(one.result().status_code for one in asked) == [200] * room + [503] * (12 - room)
    assert len(begun) == room
    assert ask(0).status_code == 200
    assert own.service.metrics.registry.get_sample_value("seqr_requests_refused_total", {"reason": "overloaded"}) == 9


def test_bodies_that_are_announced_and_do_not_come_count_until_their_clients_leave(
    own: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "READING", 1_000_000)
    url = httpx.URL(own.url)
    head = (
        f"POST /tokenize HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {own.world.keys['alice']}\r\n"
        "Content-Length: 500000\r\n\r\n"
    )

    def announce(clients: ExitStack) -> socket.socket:
        client = clients.enter_context(socket.create_connection((url.host, url.port), timeout=20))
        client.sendall(head.encode())
        return client

    def status() -> int:
        return own.http("alice").post("/tokenize", json={"prompt": "short"}).status_code

    with ExitStack() as waiting:
        announce(waiting)
        announce(waiting)
        wait_until(lambda: status() == 503)
        assert announce(waiting).recv(1000).startswith(b"HTTP/1.1 503 ")
        assert own.http("bob").post("/tokenize", json={"prompt": "short"}).status_code == 200
    wait_until(lambda: status() == 200)


def test_one_body_is_read_however_little_room_there_is(own: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "READING", 1)
    assert own.http("alice").post("/tokenize", json={"prompt": "a" * 100_000}).status_code == 200


@pytest.mark.parametrize("route", ["/tokenize", "/v1/completions"])
def test_a_user_has_no_more_turns_pending_than_there_may_be(
    own: Running, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    most = 5
    monkeypatch.setattr(turns, "PENDING", most)
    serving = own.service.serving
    slow = SlowTokenizer(serving.tokenizer, "slow")
    own.service._serving = replace(serving, tokenizer=slow)
    sent = {"model": "tiny", "prompt": "slow"} | ({"max_tokens": 1} if route == "/v1/completions" else {})
    with ThreadPoolExecutor(20) as pool:
        try:
            asked = [pool.submit(own.http("alice").post, route, json=sent) for _ in range(20)]
            wait_until(lambda: sum(one.done() for one in asked) == 20 - most)
            for one in asked:
                if one.done():
                    assert_too_many(one.result())
            assert own.http("bob").post("/tokenize", json={"prompt": "fast"}).status_code == 200
        finally:
            slow.released.set()
        assert sorted(one.result().status_code for one in asked) == [200] * most + [503] * (20 - most)
    assert own.http("alice").post(route, json=sent).status_code == 200
