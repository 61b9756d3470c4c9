"""Streams: their order, silence, slow readers, failures and clients that leave."""

import asyncio
import json
import logging
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import openai
import pytest

from inference_gateway.api.answering import Answers, Piece
from inference_gateway.api.errors import InvalidValue
from inference_gateway.engine.base import (
    Event,
    Failed,
    Finished,
    GenerationRequest,
    Shares,
    TokenLogprobs,
    Tokens,
    TokenShares,
)
from inference_gateway.errors import EngineStopped, QueueTimeout, RateLimited
from policy.errors import Unavailable
from seqr.plan import Plan
from tests.inference_gateway.conftest import HOW, Running, World, wait_until
from tests.inference_gateway.scripted import Script, says, scripted
from tests.inference_gateway.support import random_adapter, run

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 400, "stream": True}
REVOKED = Failed("permission_revoked", "the permission has ended")


@pytest.fixture(scope="module")
def own(make_world: Callable[[Path], World], plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A gateway that says something every tenth of a second at least, and keeps eight pieces of each choice."""
    world = make_world(tmp_path_factory.mktemp("streams") / "gateway")
    world.settings = world.settings.model_copy(update={"keep_alive_seconds": 0.1, "stream_buffer_events": 8})
    world.coordinator.stage("alpha", 1, random_adapter(plan, 0))
    server = Running(world).start()
    try:
        server.await_adapters("alpha")
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


def test_who_waits_too_long_for_a_place_gets_a_status_and_no_event(
    make_world: Callable[[Path], World], tmp_path: Path
) -> None:
    """However often a keep-alive would have been due meanwhile: clients repeat a 503, and no broken stream."""
    world = make_world(tmp_path / "gateway")
    few = {"max_concurrent": 1, "queue_timeout_seconds": 0.5, "keep_alive_seconds": 0.05}
    world.settings = world.settings.model_copy(update=few)
    server, over = Running(world).start(), threading.Event()

    async def holds(_request: GenerationRequest) -> AsyncGenerator[Event]:
        yield Tokens((65,))
        while not over.is_set():
            await asyncio.sleep(0.01)
        yield Finished("stop")

    try:
        server.await_adapters()
        with scripted(server, holds) as engine, ThreadPoolExecutor(1) as other:
            first = other.submit(lines_of, server)
            wait_until(lambda: engine.running == 1, 10)
            refused = server.http("alice").post("/v1/chat/completions", json=CHAT)
            over.set()
            assert first.result(timeout=20)[0] == 200
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_timeout")
        assert int(refused.headers["Retry-After"]) >= 1
    finally:
        over.set()
        server.stop()


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def test_a_failure_in_the_middle_is_an_event_and_ends_the_other_choices(own: Running, route: str) -> None:
    async def fails(request: GenerationRequest) -> AsyncGenerator[Event]:
        yield Tokens((65,))
        await asyncio.sleep(0.05)  # until the token has been read
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
    "error",
    [
        EngineStopped("the worker has stopped"),
        QueueTimeout("no place"),
        RateLimited("too many", "tokens_per_day", None),
        InvalidValue("too cold", "temperature"),
        Unavailable("no policy"),
        KeyError("a secret"),
    ],
)
def test_an_error_in_the_middle_is_an_event_with_the_body_that_it_has_before_a_stream(
    own: Running, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def breaks(_request: GenerationRequest) -> AsyncGenerator[Event]:
        yield Tokens((65,))
        raise error

    with scripted(own, breaks):
        plain = own.http("alice").post("/v1/chat/completions", json=CHAT | {"stream": False}).json()
        caplog.clear()
        status, lines = lines_of(own)
    assert status == 200 and lines[-1] == "data: [DONE]"
    assert bodies(lines)[-1] == plain and "secret" not in json.dumps(plain)
    logged = [record.message for record in caplog.records if record.levelno >= logging.ERROR]
    assert logged == (["a stream ends with an error"] if isinstance(error, KeyError) else [])


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (EngineStopped("stopped"), ("server_error", None, "engine_stopped")),
        (RateLimited("too many", "tokens_per_day", None), ("tokens", None, "rate_limit_exceeded")),
        (InvalidValue("too cold", "temperature"), ("invalid_request_error", "temperature", "invalid_value")),
        (KeyError("a secret"), ("server_error", None, "internal_error")),
    ],
)
def test_an_error_event_has_the_type_parameter_and_code_of_its_cause(
    own: Running, error: Exception, told: tuple[str, str | None, str]
) -> None:
    async def breaks(_request: GenerationRequest) -> AsyncGenerator[Event]:
        yield Tokens((65,))
        raise error

    with scripted(own, breaks):
        event = bodies(lines_of(own)[1])[-1]["error"]
    assert (event["type"], event["param"], event["code"]) == told


def test_what_cannot_be_written_into_a_stream_is_an_event_and_no_cut_connection(
    own: Running, caplog: pytest.LogCaptureFixture
) -> None:
    async def strange(_request: GenerationRequest) -> AsyncGenerator[Event]:
        yield Tokens((65,), logprobs=(TokenLogprobs(-0.5, ((2**40, -0.5),)),))  # which is no token
        yield Finished("stop")

    with scripted(own, strange):
        status, lines = lines_of(own, logprobs=True, top_logprobs=1)
    assert status == 200 and lines[-1] == "data: [DONE]"
    assert bodies(lines)[-1]["error"]["code"] == "internal_error"
    assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == [
        "a stream ends with an error"
    ]


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


class Unread:
    """A stream below HTTP whose client takes nothing after the headers until ``read`` is set."""

    def __init__(self, running: Running, user: str = "alice", **body: Any):
        self._running = running
        self._user = user
        self._body = json.dumps(CHAT | body).encode()
        self._asked = False
        self._told = b""
        self.read = asyncio.Event()

    def while_unread(self, meanwhile: Callable[["Unread"], Awaitable[None]]) -> list[dict[str, Any]]:
        """The events, read once ``meanwhile`` is over."""

        async def client() -> None:
            serving = asyncio.create_task(self._running.app(self._scope(), self._receive, self._send))
            await meanwhile(self)
            assert not serving.done()
            self.read.set()
            await serving

        asyncio.run_coroutine_threadsafe(client(), self._running.loop).result(20)
        lines = self._told.decode().split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        return bodies(lines)

    def _scope(self) -> dict[str, Any]:
        return {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
            "path": "/v1/chat/completions", "raw_path": b"/v1/chat/completions", "query_string": b"", "root_path": "",
            "scheme": "http", "server": ("x", 1), "client": ("x", 2),
            "headers": [(b"authorization", f"Bearer {self._running.world.keys[self._user]}".encode())],
        }  # fmt: skip

    async def _receive(self) -> dict[str, Any]:
        if self._asked:
            await asyncio.sleep(60)
        self._asked = True
        return {"type": "http.request", "body": self._body, "more_body": False}

    async def _send(self, message: Any) -> None:
        self._told += message.get("body", b"")
        if message["type"] == "http.response.body":
            await self.read.wait()


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(c["delta"].get("content") or "" for e in events for c in e.get("choices", ()))


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_reader_that_does_not_read_loses_its_stream_and_holds_nothing(own: Running) -> None:
    script = Endless()

    async def given_up(_: Unread) -> None:
        await until(lambda: script.said and not engine.running)
        said = script.said
        await asyncio.sleep(0.1)
        assert script.said == said < 8 + 5

    with scripted(own, script) as engine:
        error = Unread(own).while_unread(given_up)[-1]["error"]
    assert error["code"] == "reader_too_slow" and "read faster or ask for less" in error["message"]


def at_once(count: int) -> Script:
    """A script that has ``count`` tokens ready and never waits."""

    async def script(_request: GenerationRequest) -> AsyncGenerator[Event]:
        for _ in range(count):
            yield Tokens((65,))
        yield Finished("stop")

    return script


@pytest.mark.parametrize("stream", [True, False])
def test_a_reader_that_reads_gets_all_of_an_answer_that_was_written_faster_than_the_buffer_is_long(
    own: Running, stream: bool
) -> None:
    with scripted(own, at_once(100)):
        if stream:
            _, lines = lines_of(own, n=2)
            events = bodies(lines)
            texts = [text_of([e for e in events if e["choices"][0]["index"] == index]) for index in (0, 1)]
        else:
            answer = own.http("alice").post("/v1/chat/completions", json=CHAT | {"stream": False, "n": 2}).json()
            texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert [len(text) for text in texts] == [100, 100]


def test_a_revocation_in_the_middle_takes_along_what_waits_for_a_slow_reader(own: Running) -> None:
    revoke, script_waits = asyncio.Event(), asyncio.Event()

    async def script(_request: GenerationRequest) -> AsyncGenerator[Event]:
        for _ in range(6):
            yield Tokens((65,))
        script_waits.set()
        await revoke.wait()
        yield REVOKED

    async def revoked(_: Unread) -> None:
        await until(script_waits.is_set)
        revoke.set()
        await until(lambda: not engine.running)

    with scripted(own, script) as engine:
        events = Unread(own).while_unread(revoked)
    assert len(text_of(events)) <= 1  # what was being handed over
    assert events[-1]["error"]["code"] == "permission_revoked"


@pytest.mark.parametrize("act", ["nothing", "revoke the grant", "quarantine the silo"])
def test_a_revocation_after_the_end_takes_along_what_waits_for_a_slow_reader(own: Running, act: str) -> None:
    own.world.grant("bob", "alpha")

    async def acted(_: Unread) -> None:
        await until(lambda: engine.requests and not engine.running)
        if act == "revoke the grant":
            own.world.revoke("bob", "alpha")
        elif act == "quarantine the silo":
            own.world.policy.set_silo_status("alpha", "quarantined", **HOW)

    try:
        with scripted(own, at_once(6)) as engine:
            events = Unread(own, "bob").while_unread(acted)
    finally:
        own.world.policy.set_silo_status("alpha", "active", **HOW)
        if act != "revoke the grant":
            own.world.revoke("bob", "alpha")
    if act == "nothing":
        assert len(text_of(events)) == 6 and events[-1]["choices"][0]["finish_reason"] == "stop"
    else:
        assert len(text_of(events)) <= 1  # what was being handed over
        error = events[-1]["error"]
        assert (error["code"], error["type"]) == ("permission_revoked", "permission_error")


def test_a_revocation_takes_along_what_a_reader_that_was_given_up_has_not_read(own: Running) -> None:
    own.world.grant("bob", "alpha")
    script = Endless()

    async def revoked(_: Unread) -> None:
        await until(lambda: script.said and not engine.running)
        own.world.revoke("bob", "alpha")

    with scripted(own, script) as engine:
        events = Unread(own, "bob").while_unread(revoked)
    assert len(text_of(events)) <= 1
    assert events[-1]["error"]["code"] == "permission_revoked"


def test_what_was_written_before_the_deadline_can_still_be_read(own: Running) -> None:
    async def script(_request: GenerationRequest) -> AsyncGenerator[Event]:
        for _ in range(6):
            yield Tokens((65,))
        yield Failed("request_timeout", "too long")

    async def over(_: Unread) -> None:
        await until(lambda: engine.requests and not engine.running)

    with scripted(own, script) as engine:
        events = Unread(own).while_unread(over)
    assert len(text_of(events)) == 6 and events[-1]["error"]["code"] == "request_timeout"


@pytest.mark.parametrize("failure", [REVOKED, EngineStopped("the worker has stopped")])
def test_one_failed_choice_ends_the_others_though_nobody_reads(own: Running, failure: Failed | Exception) -> None:
    async def script(request: GenerationRequest) -> AsyncGenerator[Event]:
        yield Tokens((65,))
        if request is not engine.requests[0]:
            await asyncio.sleep(60)
        await until(lambda: len(engine.requests) == 2)
        if isinstance(failure, Exception):
            raise failure
        yield failure

    async def over(_: Unread) -> None:
        await until(lambda: len(engine.requests) == 2 and not engine.running)

    with scripted(own, script) as engine:
        events = Unread(own, n=2).while_unread(over)
    assert events[-1]["error"]["code"] == failure.code  # type: ignore[union-attr]


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
        answers = Answers(nullcontext([endless(0), endless(1)]), 2, 5, lambda: None)
        await asyncio.sleep(0.05)
        pieces = []
        while (piece := await answers.get(1)) is not None:
            pieces.append(piece)
        await answers.aclose()
        return pieces

    pieces = run(read())
    assert len(pieces) == 6
    assert pieces[-1].failed is not None and pieces[-1].failed.code == "reader_too_slow"


def test_the_first_of_several_errors_is_the_one_that_is_told() -> None:
    async def breaks() -> AsyncGenerator[Piece]:
        yield Piece(0, (), 1)
        raise EngineStopped("the first")

    async def breaks_when_it_is_ended() -> AsyncGenerator[Piece]:
        try:
            yield Piece(1, (), 1)
            await asyncio.sleep(60)
        finally:
            raise ValueError("the second")

    async def read() -> None:
        answers = Answers(nullcontext([breaks(), breaks_when_it_is_ended()]), 2, 5, lambda: None)
        with pytest.raises(EngineStopped, match="the first"):
            while True:
                assert await answers.get(5) is not None
        await asyncio.sleep(0.05)
        with pytest.raises(EngineStopped, match="the first"):
            await answers.get(5)
        await answers.aclose()

    run(read())


def test_the_summary_counts_choices_that_ended_at_a_stop_string_beside_those_that_did_not(own: Running) -> None:
    ids = own.service.serving.tokenizer("ab", add_special_tokens=False)["input_ids"]

    async def script(request: GenerationRequest) -> AsyncGenerator[Event]:
        part = TokenShares({"clinic": 4}, 4, None)
        yield Tokens((ids[0],), (), (part,), Shares({"clinic": 4}, {"clinic": 4}, 8, 4))
        if request is engine.requests[0]:
            yield Tokens((ids[1],), (), (part,), Shares({"clinic": 8}, {"clinic": 8}, 12, 8))
            await asyncio.sleep(60)
        yield Finished("length", Shares({"clinic": 4}, {"clinic": 4}, 8, 4))

    asked = CHAT | {"seqr": {"attribution": True}, "n": 2, "stop": "b"}
    with scripted(own, script) as engine:
        plain = own.http("alice").post("/v1/chat/completions", json=asked | {"stream": False}).json()
        engine.requests.clear()
        _, lines = lines_of(own, **asked)
    assert sorted(choice["finish_reason"] for choice in plain["choices"]) == ["length", "stop"]
    assert plain["seqr"]["shares"] == {"clinic": 0.6}  # 8 + 4 of 12 + 8
    assert plain["seqr"]["answer_shares"] == {"clinic": 1.0}
    assert bodies(lines)[-1]["seqr"] == plain["seqr"]


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
