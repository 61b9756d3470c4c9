"""The unmodified OpenAI clients, Python and JavaScript, on everything a client has a method for."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.inference_gateway.conftest import Running, World
from tests.inference_gateway.test_chat_api import ask
from tests.inference_gateway.test_tools import TAGGED, WEATHER

JS = Path(__file__).parent / "js"
needs_javascript = pytest.mark.skipif(
    shutil.which("node") is None or not (JS / "node_modules" / "openai").is_dir(),
    reason="needs node and `npm install` in tests/inference_gateway/js",
)


def node(script: str, running: Running, user: str) -> Any:
    command = ["node", str(JS / script), f"{running.url}/v1", running.world.keys[user]]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.fixture(scope="module")
def calling(make_world: Callable[[Path], World], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A gateway whose model knows tools."""
    server = Running(make_world(tmp_path_factory.mktemp("calling") / "gateway")).start()
    try:
        server.await_adapters()
        server.service.serving.tokenizer.chat_template = TAGGED
        yield server
    finally:
        server.stop()


@needs_javascript
def test_the_javascript_client_gets_what_the_python_client_gets(running: Running) -> None:
    got = node("client.mjs", running, "alice")
    plain = ask(running, "alice")
    assert got["plain"]["text"] == got["streamed"]["text"] == plain.choices[0].message.content
    assert got["streamed"]["roles"] == ["assistant"]
    assert got["streamed"]["reasons"] == [plain.choices[0].finish_reason]
    assert got["streamed"]["usage"] == got["plain"]["usage"] == plain.usage.to_dict()
    assert got["logprobs"] and set(got["logprobs"]) == {2}
    drawn = ask(running, "alice", n=3, temperature=1.2, seed=7)
    assert got["choices"] == [choice.message.content for choice in drawn.choices]
    assert got["schema"]["colour"] in ("red", "blue") and 0 <= got["schema"]["count"] <= 9
    completion = running.openai("alice").completions.create(model="tiny", prompt="The red boat", max_tokens=6)
    assert got["completion"]["text"] == completion.choices[0].text and got["completion"]["tokens"] >= 1
    assert got["models"] == ["tiny", "silo:alpha", "silo:gamma"]
    assert got["aborted"] == 3


@needs_javascript
def test_the_javascript_client_raises_its_own_errors(running: Running) -> None:
    errors = node("client.mjs", running, "alice")["errors"]
    assert errors == {
        "badRequest": {"kind": "BadRequestError", "status": 400, "code": "invalid_value", "param": "temperature"},
        "notFound": {"kind": "NotFoundError", "status": 404, "code": "model_not_found", "param": "model"},
        "authentication": {"kind": "AuthenticationError", "status": 401, "code": "key_unknown", "param": None},
    }


@needs_javascript
def test_the_javascript_client_reads_calls_of_tools(calling: Running) -> None:
    for answer in node("tools.mjs", calling, "alice"):
        assert answer["reason"] == "tool_calls"
        (call,) = answer["calls"]
        assert call["function"]["name"] == "weather"
        assert json.loads(call["function"]["arguments"])["place"] in ("Oslo", "Rome")


def test_the_python_clients_stream_helper_puts_an_answer_together(calling: Running) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "What is the weather?"}],
        "tools": [WEATHER],
        "tool_choice": "required",
        "max_tokens": 120,
    }
    with calling.openai("alice").chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls or []
    assert call.function.name == "weather" and json.loads(call.function.arguments)["place"] in ("Oslo", "Rome")


def test_an_answer_can_be_handed_back_as_the_python_client_dumps_it(running: Running, calling: Running) -> None:
    question: Any = {"role": "user", "content": "What is the weather?"}
    first = ask(running, "alice", messages=[question], max_tokens=3).choices[0].message
    assert "annotations" in first.model_dump()  # with nothing in it
    again = ask(running, "alice", messages=[question, first.model_dump(), question], max_tokens=3)
    as_object = ask(running, "alice", messages=[question, first, question], max_tokens=3)
    assert again.usage == as_object.usage

    tools: Any = {"tools": [WEATHER], "max_tokens": 120}
    called = ask(calling, "alice", messages=[question], tool_choice="required", **tools).choices[0].message
    (call,) = called.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    assert ask(calling, "alice", messages=[question, called.model_dump(), result], **tools).choices


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"annotations": [{"type": "url_citation"}]}, "messages.0.annotations: List should have at most 0 items"),
        ({"audio": {"id": "x"}}, "messages.0.audio: Input should be None"),
        ({"refusal": "no"}, "messages.0.refusal: Input should be None"),
        ({"function_call": {"name": "f"}}, "functions are not supported by this gateway; use tools"),
    ],
)
def test_what_an_answer_here_never_has_is_refused_by_name(running: Running, given: Any, message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        ask(running, "alice", messages=[{"role": "assistant", "content": "x", **given}])


def test_the_python_client_reads_raw_headers(running: Running) -> None:
    raw = running.openai("alice").chat.completions.with_raw_response.create(
        model="tiny", messages=[{"role": "user", "content": "Hello"}], max_tokens=1
    )
    assert raw.headers["x-request-id"] and raw.headers["x-seqr-policy-version"]
    assert raw.parse().choices[0].message.role == "assistant"


def test_the_async_python_client_is_served_too(running: Running) -> None:
    import asyncio

    async def text() -> str:
        async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key=running.world.keys["alice"]) as client:
            stream = await client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "Hello"}], max_tokens=4, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    plain = ask(running, "alice", messages=[{"role": "user", "content": "Hello"}], max_tokens=4)
    assert asyncio.run(text()) == plain.choices[0].message.content
