"""Streams: their order, silence, slow readers, failures and clients that leave."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import openai
import pytest

from inference_gateway.api.answering import Answers, Piece
from inference_gateway.engine.base import Event, Failed, Finished, GenerationRequest, Shares, Tokens, TokenShares
from inference_gateway.errors import EngineStopped
from tests.inference_gateway.conftest import Running, World, wait_until
from tests.inference_gateway.scripted import says, scripted
from tests.inference_gateway.support import run

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 400, "stream": True}
REVOKED = Failed("permission_revoked", "the permission has ended")


@pytest.fixture(scope="module")
def own(make_world: Callable[[Path], World], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A gateway that says something every tenth of a second at least, and keeps eight pieces for a reader."""
    world = make_world(tmp_path_factory.mktemp("streams") / "gateway")
    world.settings = world.settings.model_copy(update={"keep_alive_seconds": 0.1, "stream_buffer_events": 8})
    server = Running(world).start()
    try:
        server.await_adapters()
        yield server
    finally:
        server.stop()


def lines_of(running: Running, route: str = "/v1/chat/completions", **body: Any) -> tuple[int, list[str]]:
    with running.http("alice").stream("POST", route, json=CHAT | body) as response:
        return response.status_code, [line for line in response.iter_lines() if line]


def bodies(lines: list[str]) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]


def test_a_stream_begins_with_the_role_and_ends_with_one_usage_and_done(own: Running) -> None:
    with scripted(own, says(own, "ab")):
        _, lines = lines_of(own, stream_options={"include_usage": True}, n=2)
    events = bodies(lines)
    assert [e["choices"][0]["delta"] for e in events[:2]] == [{"role": "assistant", "content": ""}] * 2
    assert sorted(e["choices"][0]["index"] for e in events[:2]) == [0, 1]
    assert [e["usage"] for e in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == 4
    assert lines[-1] == "data: [DONE]"
    assert len({e["id"] for e in events}) == 1


def test_silence_is_filled_with_comments_before_and_between_tokens(own: Running) -> None:
    async def slow(_request: GenerationRequest) -> AsyncGenerator[Event]:
        await asyncio.sleep(0.35)
        yield Tokens((65,))
        await asyncio.sleep(0.35)
        yield Finished("stop")

    with scripted(own, slow):
        status, lines = lines_of(own)
    kinds = ["comment" if line == ": keep-alive" else "data" for line in lines]
    assert status == 200 and kinds.count("comment") >= 4
    assert lines[-1] == "data: [DONE]" and bodies(lines)[-1]["choices"][0]["finish_reason"] == "stop"
    with scripted(own, slow):  # the client skips comments
        stream = own.openai("alice").chat.completions.create(**CHAT)  # type: ignore[call-overload]
        assert [c.choices[0].finish_reason for c in stream][-1] == "stop"


def test_a_failure_before_anything_is_said_is_an_http_error(own: Running) -> None:
    async def fails(_request: GenerationRequest) -> AsyncGenerator[Event]:
        yield REVOKED

    with scripted(own, fails):
        response = own.http("alice").post("/v1/chat/completions", json=CHAT)
    assert (response.status_code, response.json()["error"]["code"]) == (403, "permission_revoked")


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def test_a_failure_in_the_middle_is_an_event_and_ends_the_other_choices(own: Running, route: str) -> None:
    async def fails(request: GenerationRequest) -> AsyncGenerator[Event]:
        yield Tokens((65,))
        if request is engine.requests[0]:
            yield REVOKED
        else:
            await asyncio.sleep(60)

    with scripted(own, fails) as engine:
        prompt = {"messages": None, "prompt": "x"} if route == "/v1/completions" else {}
        status, lines = lines_of(own, route, n=2, **prompt)
        wait_until(lambda: engine.running == 0, 5)
    assert status == 200 and bodies(lines)[-1]["error"]["code"] == "permission_revoked"
    assert lines[-1] == "data: [DONE]"


@pytest.mark.parametrize(
    ("error", "code"), [(EngineStopped("the worker has stopped"), "engine_stopped"), (KeyError("x"), "internal_error")]
)
def test_an_exception_in_the_middle_is_an_event_that_tells_no_cause(own: Running, error: Exception, code: str) -> None:
    async def breaks(_request: GenerationRequest) -> AsyncGenerator[Event]:
        yield Tokens((65,))
        raise error

    with scripted(own, breaks):
        _, lines = lines_of(own)
    told = bodies(lines)[-1]["error"]
    assert told["code"] == code and "KeyError" not in json.dumps(told)
    assert lines[-1] == "data: [DONE]"


def test_the_openai_client_raises_on_a_failure_in_the_middle(own: Running) -> None:
    async def fails(_request: GenerationRequest) -> AsyncGenerator[Event]:
        yield Tokens((65,))
        yield REVOKED

    with scripted(own, fails), pytest.raises(openai.APIError, match="the permission has ended"):
        list(own.openai("alice").chat.completions.create(**CHAT))  # type: ignore[call-overload]


class Endless:
    """A script without an end, and how far it has come."""

    def __init__(self) -> None:
        self.said = 0

    async def __call__(self, _request: GenerationRequest) -> AsyncGenerator[Event]:
        while True:
            self.said += 1
            yield Tokens((65,))
            await asyncio.sleep(0)


def test_a_reader_that_does_not_read_loses_its_stream_and_holds_nothing(own: Running) -> None:
    """Below HTTP, where a test decides when the client takes the next part."""
    script, sent, read = Endless(), [], asyncio.Event()
    body = json.dumps(CHAT).encode()
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
        "path": "/v1/chat/completions", "raw_path": b"/v1/chat/completions", "query_string": b"", "root_path": "",
        "scheme": "http", "server": ("x", 1), "client": ("x", 2),
        "headers": [(b"authorization", f"Bearer {own.world.keys['alice']}".encode())],
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        if sent_body:
            await asyncio.sleep(60)
        sent_body.append(True)
        return {"type": "http.request", "body": body, "more_body": False}

    sent_body: list[bool] = []

    async def send(message: Any) -> None:
        sent.append(message)
        if message["type"] == "http.response.body":
            await read.wait()

    async def client(engine: Any) -> int:
        serving = asyncio.create_task(own.app(scope, receive, send))
        while engine.running or not script.said:
            await asyncio.sleep(0.01)
        said = script.said
        await asyncio.sleep(0.1)
        assert script.said == said and not serving.done()  # given up, though nothing has been read
        read.set()
        await serving
        return said

    with scripted(own, script) as engine:
        said = asyncio.run_coroutine_threadsafe(client(engine), own.loop).result(20)
    assert said < 8 + 5
    told = b"".join(message.get("body", b"") for message in sent).decode()
    events = [json.loads(line.removeprefix("data: ")) for line in told.split("\n\n") if line.startswith("data: {")]
    assert events[-1]["error"]["code"] == "reader_too_slow"
    assert "read faster or ask for less" in events[-1]["error"]["message"]
    assert told.endswith("data: [DONE]\n\n")


def test_a_client_that_leaves_in_silence_ends_its_request(own: Running) -> None:
    async def silent(_request: GenerationRequest) -> AsyncGenerator[Event]:
        await asyncio.sleep(60)
        yield Finished("stop")

    with scripted(own, silent) as engine:
        with own.http("alice").stream("POST", "/v1/chat/completions", json=CHAT) as response:
            lines = response.iter_lines()
            next(lines)
            assert engine.running == 1
        wait_until(lambda: engine.running == 0, 5)


def test_pieces_beyond_the_limit_end_every_choice() -> None:
    async def endless(index: int) -> AsyncGenerator[Piece]:
        while True:
            yield Piece(index, (), 1)
            await asyncio.sleep(0)

    async def read() -> list[Piece]:
        answers = Answers(nullcontext([endless(0), endless(1)]), 2, 5)
        await asyncio.sleep(0.05)
        pieces = []
        while (piece := await answers.get(1)) is not None:
            pieces.append(piece)
        await answers.aclose()
        return pieces

    pieces = run(read())
    assert len(pieces) == 6
    assert pieces[-1].failed is not None and pieces[-1].failed.code == "reader_too_slow"


def test_per_token_attribution_names_the_silo_with_the_largest_share(own: Running) -> None:
    async def script(_request: GenerationRequest) -> AsyncGenerator[Event]:
        shares = [
            TokenShares({"clinic": 10, "bank": 2}, 12, 1.7),
            TokenShares({"clinic": 6, "bank": 6}, 12, 0.0),
            TokenShares({}, 12, None),
        ]
        yield Tokens((65, 66, 67), (), tuple(shares))
        yield Finished("stop", Shares({"clinic": 16, "bank": 8}, {"clinic": 16, "bank": 8}, 36, 36))

    asked = {"seqr": {"attribution": True}}
    with scripted(own, script):
        plain = own.http("alice").post("/v1/chat/completions", json=CHAT | asked | {"stream": False, "n": 2}).json()
        _, lines = lines_of(own, **asked)
    tokens = plain["choices"][1]["seqr"]["tokens"]
    assert [token["silo"] for token in tokens] == ["clinic", "bank", None]
    assert tokens[0]["shares"] == {"bank": 0.166667, "clinic": 0.833333} and tokens[0]["margin"] == 1.7
    assert tokens[2] == {"token": tokens[2]["token"], "id": 67, "silo": None, "shares": {}, "margin": None}
    assert plain["seqr"]["shares"] == {"bank": 0.222222, "clinic": 0.444444}  # of both choices
    events = bodies(lines)
    told = [one for e in events for c in e["choices"] for one in c.get("seqr", {}).get("tokens", [])]
    assert told == tokens
    assert events[-1]["seqr"]["shares"] == plain["seqr"]["shares"] and events[-1]["choices"][0]["finish_reason"]
