"""The spans of requests: their tree, what they tell, and what they must not."""

import asyncio
import io
import json
import logging
import re
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from inference_gateway.engine.base import Event, Failed, Finished, GenerationRequest, Shares, Tokens
from inference_gateway.fair_queue import FairQueue
from inference_gateway.otlp import OtlpTracing
from policy.limits import Limits
from seqr.logs import JsonLines
from seqr.plan import Plan
from tests.inference_gateway.conftest import HOW, Running, World, wait_until
from tests.inference_gateway.scripted import says, scripted
from tests.inference_gateway.support import random_adapter

SECRET = "Marguerite Xylophone lives at 7 Quince Lane"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 4}
CHAT = "/v1/chat/completions"
TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED = {"traceparent": f"00-{TRACE}-{CALLER}-01"}


class Collected:
    """The spans that a gateway has made since the test began."""

    def __init__(self, exporter: InMemorySpanExporter):
        self._exporter = exporter

    def all(self, requests: int = 1) -> list[ReadableSpan]:
        """Every span, in the order of their beginnings, when ``requests`` requests are over."""
        wait_until(lambda: len(self._servers()) >= requests)
        return sorted(self._exporter.get_finished_spans(), key=lambda span: span.start_time or 0)

    def request(self) -> ReadableSpan:
        """The server span of the only request."""
        self.all()
        [span] = self._servers()
        return span

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.all() if span.name == name]

    def text(self) -> str:
        return "\n".join(span.to_json() for span in self._exporter.get_finished_spans())

    def _servers(self) -> list[ReadableSpan]:
        return [span for span in self._exporter.get_finished_spans() if span.kind is SpanKind.SERVER]


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture(scope="module")
def own(
    make_world: Callable[[Path], World],
    plan: Plan,
    tmp_path_factory: pytest.TempPathFactory,
    exporter: InMemorySpanExporter,
) -> Iterator[Running]:
    """A traced gateway; alice may use alpha and nobody, ops may read metrics."""
    world = make_world(tmp_path_factory.mktemp("traces") / "gateway")
    world.coordinator.stage("alpha", 1, random_adapter(plan, 0))
    world.grant("alice", "alpha")
    world.grant("alice", "nobody")
    world.policy.create_user("ops", ["service"], **HOW)
    world.keys["ops"] = world.policy.create_key("ops", ["metrics"], **HOW).secret
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    server = Running(world, tracing=OtlpTracing(provider, exporter)).start()
    try:
        server.await_adapters("alpha")
        yield server
    finally:
        server.stop()


@pytest.fixture
def spans(own: Running, exporter: InMemorySpanExporter) -> Collected:
    exporter.clear()
    return Collected(exporter)


@pytest.fixture
def logged() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """What the gateway logs during the test, as JSON."""
    root, handler = logging.getLogger(), logging.StreamHandler(io.StringIO())
    level = root.level
    handler.setFormatter(JsonLines())
    handler.addFilter(lambda record: record.name.startswith("inference_gateway"))
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield lambda: [json.loads(line) for line in handler.stream.getvalue().splitlines()]
    root.removeHandler(handler)
    root.setLevel(level)


def told(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def names(spans: list[ReadableSpan]) -> list[str]:
    return [span.name for span in spans]


def ok(span: ReadableSpan) -> bool:
    return span.status.status_code is StatusCode.UNSET


def test_a_chat_has_one_server_span_with_queue_prefill_and_decode_within(own: Running, spans: Collected) -> None:
    answer = own.http("alice").post(CHAT, json=BODY).json()
    server, queue, prefill, decode = spans.all()
    assert names(spans.all()) == [f"POST {CHAT}", "queue", "prefill", "decode"]
    assert server.kind is SpanKind.SERVER and server.parent is None and ok(server)
    for child in (queue, prefill, decode):
        assert child.parent is not None and child.parent.span_id == server.context.span_id
        assert child.context.trace_id == server.context.trace_id
        assert child.kind is SpanKind.INTERNAL and ok(child) and told(child)["seqr.answer.index"] == 0
    times = [server.start_time, queue.start_time, queue.end_time, prefill.start_time, prefill.end_time]
    times += [decode.start_time, decode.end_time, server.end_time]
    assert times == sorted(times, key=lambda time: time or 0)
    assert told(decode)["seqr.answer.tokens"] == answer["usage"]["completion_tokens"] > 0
    assert told(decode)["seqr.answer.reason"] == answer["choices"][0]["finish_reason"]


def test_a_server_span_tells_the_conventions_attributes_and_ours(own: Running, spans: Collected) -> None:
    response = own.http("alice").post(CHAT, json=BODY | {"seed": 5, "temperature": 0.5, "top_p": 0.9})
    answer, server = response.json(), told(spans.request())
    assert server == {
        "url.scheme": "http",
        "http.request.method": "POST",
        "http.route": CHAT,
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "seqr",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.stream": False,
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.seed": 5,
        "gen_ai.usage.input_tokens": answer["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": answer["usage"]["completion_tokens"],
        "gen_ai.response.finish_reasons": (answer["choices"][0]["finish_reason"],),
        "seqr.routing.mode": "prompt_evidence",
        "seqr.policy.version": int(response.headers["x-seqr-policy-version"]),
        "seqr.library.version": response.headers["x-seqr-library-version"],
        "seqr.silos.permitted": 2,
        "seqr.silos.used": 1,
    }


def test_a_stream_has_the_same_tree_and_the_time_to_its_first_chunk(own: Running, spans: Collected) -> None:
    lines = own.http("alice").post(CHAT, json=BODY | {"stream": True}).text.strip().splitlines()
    assert lines[-1] == "data: [DONE]"
    assert names(spans.all()) == [f"POST {CHAT}", "queue", "prefill", "decode"]
    server = told(spans.request())
    assert server["gen_ai.request.stream"] is True and server["http.response.status_code"] == 200
    assert server["gen_ai.response.time_to_first_chunk"] > 0
    assert server["gen_ai.usage.output_tokens"] == told(spans.named("decode")[0])["seqr.answer.tokens"]


def test_each_of_several_choices_has_its_own_spans(own: Running, spans: Collected) -> None:
    with scripted(own, says(own, "ab", "length")):
        own.http("alice").post(CHAT, json=BODY | {"n": 3})
    for name in ("queue", "prefill", "decode"):
        assert sorted(told(span)["seqr.answer.index"] for span in spans.named(name)) == [0, 1, 2]
    server = told(spans.request())
    assert server["gen_ai.request.choice.count"] == 3
    assert server["gen_ai.response.finish_reasons"] == ("length",) * 3
    assert server["gen_ai.usage.output_tokens"] == 6


def test_a_text_completion_is_named_so(own: Running, spans: Collected) -> None:
    own.http("alice").post("/v1/completions", json={"model": "tiny", "prompt": SECRET, "max_tokens": 2})
    assert spans.request().name == "POST /v1/completions"
    assert told(spans.request())["gen_ai.operation.name"] == "text_completion"


def test_a_route_without_answers_has_a_span_without_gen_ai_attributes(own: Running, spans: Collected) -> None:
    own.http("alice").get("/v1/models")
    assert names(spans.all()) == ["GET /v1/models"]
    assert not [name for name in told(spans.request()) if not name.startswith(("http.", "url."))]


# Traces that callers have begun


def test_the_callers_traceparent_is_the_parent(own: Running, spans: Collected) -> None:
    own.http("alice").post(CHAT, json=BODY, headers=SAMPLED)
    server = spans.request()
    assert server.parent is not None and server.parent.is_remote
    assert f"{server.parent.span_id:016x}" == CALLER
    assert {f"{span.context.trace_id:032x}" for span in spans.all()} == {TRACE}


def test_a_request_whose_caller_does_not_sample_makes_no_spans_but_is_logged_with_its_trace(
    own: Running, spans: Collected, logged: Callable[[], list[dict[str, Any]]]
) -> None:
    own.http("alice").post(CHAT, json=BODY, headers={"traceparent": f"00-{TRACE}-{CALLER}-00"})
    own.http("alice").get("/v1/models")
    assert names(spans.all()) == ["GET /v1/models"]
    assert logged()[0]["trace_id"] == TRACE


@pytest.mark.parametrize(
    "headers",
    [
        [("traceparent", f"00-{TRACE}-{CALLER}")],
        [("traceparent", f"ff-{TRACE}-{CALLER}-01")],
        [("traceparent", f"00-{'0' * 32}-{CALLER}-01")],
        [("traceparent", SECRET)],
        [("traceparent", "0" * 5000)],
        [("traceparent", f"00-{TRACE}-{CALLER}-01")] * 2,
    ],
)
def test_a_malformed_traceparent_begins_a_new_trace(
    own: Running, spans: Collected, headers: list[tuple[str, str]]
) -> None:
    key = ("Authorization", f"Bearer {own.world.keys['alice']}")
    assert own.http().get("/v1/models", headers=[key, *headers]).status_code == 200
    server = spans.request()
    assert server.parent is None and f"{server.context.trace_id:032x}" != TRACE


# What went wrong


def refusal(own: Running, spans: Collected, user: str | None, **body: Any) -> tuple[int, dict[str, Any]]:
    response = own.http(user).post(CHAT, json=BODY | body)
    server = spans.request()
    assert told(server)["http.response.status_code"] == response.status_code
    assert told(server)["error.type"] == response.json()["error"]["code"]
    assert ok(server) is (response.status_code < 500)
    return response.status_code, told(server)


def test_a_refusal_tells_its_status_and_code_and_nothing_was_generated(own: Running, spans: Collected) -> None:
    status, attributes = refusal(own, spans, None)
    assert (status, attributes["error.type"]) == (401, "key_missing")
    assert names(spans.all()) == [f"POST {CHAT}"] and "gen_ai.request.model" not in attributes


@pytest.mark.parametrize(
    ("user", "body", "status", "code"),
    [
        ("ops", {}, 403, "scope_missing"),
        ("alice", {"model": "silo:beta"}, 404, "model_not_found"),
        ("alice", {"model": SECRET}, 404, "model_not_found"),
        ("alice", {"temperature": -1}, 400, "invalid_value"),
        ("alice", {"seqr": {"silos": ["nobody"]}}, 503, "silo_unavailable"),
    ],
)
def test_every_kind_of_refusal_is_told(
    own: Running, spans: Collected, user: str, body: dict[str, Any], status: int, code: str
) -> None:
    found, attributes = refusal(own, spans, user, **body)
    assert (found, attributes["error.type"]) == (status, code)
    assert names(spans.all()) == [f"POST {CHAT}"]


def test_a_limit_that_is_reached_is_told(own: Running, spans: Collected) -> None:
    own.world.policy.set_limits("user:carol", Limits(tokens_per_minute=1), **HOW)
    try:
        status, attributes = refusal(own, spans, "carol")
    finally:
        own.world.policy.clear_limits("user:carol", **HOW)
    assert (status, attributes["error.type"]) == (429, "rate_limit_exceeded")


def test_a_full_queue_is_told_by_the_request_and_its_queue_span(
    own: Running, spans: Collected, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own.service.admission, "queue", FairQueue(1, 0))
    go_on = threading.Event()

    async def held(_request: GenerationRequest) -> AsyncGenerator[Event]:
        await asyncio.to_thread(go_on.wait, 30)
        yield Finished("stop")

    with scripted(own, held) as engine, ThreadPoolExecutor(1) as pool:
        first = pool.submit(own.http("alice").post, CHAT, json=BODY)
        wait_until(lambda: engine.running == 1)
        exporter.clear()
        status, attributes = refusal(own, spans, "alice")
        [queue] = spans.named("queue")
        go_on.set()
        assert first.result().status_code == 200
    assert (status, attributes["error.type"]) == (503, "overloaded")
    assert told(queue)["error.type"] == "overloaded" and not ok(queue)
    assert not [span for span in spans.all() if span.name in ("prefill", "decode") and span.parent == queue.parent]


def test_an_engines_failure_before_the_first_token_ends_prefill(own: Running, spans: Collected) -> None:
    async def fails(_request: GenerationRequest) -> AsyncGenerator[Event]:
        yield Failed("generation_failed", SECRET)

    with scripted(own, fails):
        status, attributes = refusal(own, spans, "alice")
    assert (status, attributes["error.type"]) == (500, "generation_failed")
    assert attributes["gen_ai.response.finish_reasons"] == ("error",)
    assert names(spans.all()) == [f"POST {CHAT}", "queue", "prefill"]
    [prefill] = spans.named("prefill")
    assert told(prefill)["error.type"] == "generation_failed" and not ok(prefill)
    assert "Marguerite" not in spans.text()


def test_a_failure_in_the_middle_of_a_stream_is_an_error_though_the_status_is_200(
    own: Running, spans: Collected
) -> None:
    async def fails(_request: GenerationRequest) -> AsyncGenerator[Event]:
        yield Tokens((65,))
        await asyncio.sleep(0.05)
        yield Failed("permission_revoked", "the permission has ended")

    with scripted(own, fails):
        assert own.http("alice").post(CHAT, json=BODY | {"stream": True}).status_code == 200
    server, [decode] = spans.request(), spans.named("decode")
    assert told(server)["http.response.status_code"] == 200
    assert told(server)["error.type"] == told(decode)["error.type"] == "permission_revoked"
    assert not ok(server) and not ok(decode)


def test_an_unforeseen_error_is_told_without_what_it_says_and_logged_with_its_trace(
    own: Running, spans: Collected, logged: Callable[[], list[dict[str, Any]]]
) -> None:
    async def broken(_request: GenerationRequest) -> AsyncGenerator[Event]:
        raise RuntimeError(SECRET)
        yield

    with scripted(own, broken):
        status, attributes = refusal(own, spans, "alice")
    assert (status, attributes["error.type"]) == (500, "internal_error")
    assert "Marguerite" not in spans.text() and not [span for span in spans.all() if span.events]
    cause, access = logged()
    assert cause["message"] == "a request could not be served"
    for line in (cause, access):
        assert line["trace_id"] == f"{spans.request().context.trace_id:032x}"
        assert line["span_id"] == f"{spans.request().context.span_id:016x}"


def test_a_client_that_leaves_its_stream_has_aborted_it(own: Running, spans: Collected) -> None:
    async def endless(_request: GenerationRequest) -> AsyncGenerator[Event]:
        while True:
            yield Tokens((65,))
            await asyncio.sleep(0.01)

    with scripted(own, endless), own.http("alice").stream("POST", CHAT, json=BODY | {"stream": True}) as stream:
        next(stream.iter_lines())
    server, [decode] = spans.request(), spans.named("decode")
    assert names(spans.all()) == [f"POST {CHAT}", "queue", "prefill", "decode"]
    assert told(server)["gen_ai.response.finish_reasons"] == ("abort",)
    assert told(decode)["seqr.answer.reason"] == "abort" and ok(decode)
    assert "error.type" not in told(server) and ok(server)


def test_a_client_that_leaves_while_it_waits_ends_its_queue_span(
    own: Running, spans: Collected, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = FairQueue(1, 8)
    monkeypatch.setattr(own.service.admission, "queue", queue)
    go_on = threading.Event()

    async def held(_request: GenerationRequest) -> AsyncGenerator[Event]:
        await asyncio.to_thread(go_on.wait, 30)
        yield Finished("stop")

    with scripted(own, held), ThreadPoolExecutor(1) as pool:
        first = pool.submit(own.http("alice").post, CHAT, json=BODY)
        wait_until(lambda: queue.running == 1)
        with pytest.raises(Exception, match="timed out"):
            own.http("alice").post(CHAT, json=BODY, timeout=0.5)
        left = spans.request()
        go_on.set()
        first.result()
    mine = [span for span in spans.all(2) if span.parent is not None and span.parent.span_id == left.context.span_id]
    assert names(mine) == ["queue"] and told(left)["http.response.status_code"] == 499


# What spans do not hold


def test_no_span_holds_text_paths_users_keys_or_silos(own: Running, spans: Collected) -> None:
    client = own.http("alice")
    given = {"X-Request-Id": "Marguerite", "tracestate": "vendor=Marguerite", "User-Agent": SECRET}
    client.headers.update(given | SAMPLED)
    client.post(CHAT, json=BODY | {"model": "silo:alpha", "user": SECRET, "stop": ["Quince"], "max_tokens": 30})
    answer = client.post(CHAT, json=BODY | {"seqr": {"attribution": True, "silos": ["alpha"]}, "max_tokens": 30})
    client.post(f"{CHAT}?{SECRET}", content=SECRET.encode())
    client.get(f"/v1/models/{SECRET}")
    client.get(f"/{SECRET}")
    client.request("PROPFIND", "/v1/models")
    spans.all(6)
    text = spans.text()
    words = ("Marguerite", "PROPFIND", "Xylophone", "Quince", "alice", "key-", "seqr_", "alpha")
    assert [word for word in words if word in text] == []
    said = answer.json()["choices"][0]["message"]["content"]
    assert len(said) < 5 or said not in text
    assert {"HTTP /v1/models", "GET", "GET /v1/models/{name:path}"} <= set(names(spans.all(6)))


def test_silos_are_named_only_where_the_operator_counts_all_shares(
    own: Running, spans: Collected, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def shaped(request: GenerationRequest) -> AsyncGenerator[Event]:
        assert request.attribution
        yield Tokens((65,))
        yield Finished("stop", Shares({"alpha": 5, "gamma": 0}, {"alpha": 5}, 7, 7))

    asked = BODY | {"seqr": {"attribution": True}}
    with scripted(own, shaped):
        own.http("alice").post(CHAT, json=asked)
        assert not [name for span in spans.all() for name in told(span) if "attribution" in name]
        exporter.clear()
        counting = own.service.admission.settings.model_copy(update={"count_all_shares": True})
        monkeypatch.setattr(own.service.admission, "settings", counting)
        own.http("alice").post(CHAT, json=BODY)
    [decode] = spans.named("decode")
    assert told(decode)["seqr.attribution.silos"] == ("alpha", "")
    assert told(decode)["seqr.attribution.choices"] == (5, 2)


def test_every_attribute_of_a_span_is_in_the_operators_page_and_the_other_way_round(
    own: Running, spans: Collected, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = own.service.admission.settings.model_copy(update={"count_all_shares": True})
    monkeypatch.setattr(own.service.admission, "settings", counting)
    own.http("alice").post(CHAT, json=BODY | {"n": 2, "seed": 1, "stream": True})
    own.http().get("/v1/models")
    found = {name for span in spans.all(2) for name in told(span)}
    page = (Path(__file__).parents[2] / "docs" / "operator.md").read_text()
    table = page.partition("## Traces")[2].partition("\n## ")[0]
    assert set(re.findall(r"`((?:gen_ai|seqr|http|url|error)\.[a-z_.]+)`", table)) == found


def test_what_is_polled_all_the_time_is_not_traced(own: Running, spans: Collected) -> None:
    own.http("ops").get("/metrics")
    own.http().get("/healthz")
    own.http().get("/readyz")
    own.http("alice").get("/v1/models")
    assert names(spans.all()) == ["GET /v1/models"]


def test_the_log_line_of_a_request_names_its_trace_and_span(
    own: Running, spans: Collected, logged: Callable[[], list[dict[str, Any]]]
) -> None:
    own.http("alice").post(CHAT, json=BODY, headers=SAMPLED)
    server = spans.request()
    wait_until(lambda: len(logged()) == 1)
    [line] = logged()
    assert (line["trace_id"], line["span_id"]) == (TRACE, f"{server.context.span_id:016x}")
    assert re.fullmatch("[0-9a-f]{16}", line["span_id"])
