"""Traces on their way to a collector: what arrives, collectors that do not listen, and gateways without any."""

import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.trace import ProxyTracerProvider, get_current_span, get_tracer_provider

from inference_gateway import otlp
from inference_gateway.settings import Telemetry, load_settings
from seqr.plan import Plan
from seqr.supervisor import free_port
from tests.inference_gateway.conftest import Running, World, wait_until
from tests.inference_gateway.fake_coordinator import FakeCoordinator
from tests.inference_gateway.support import random_adapter
from tests.inference_gateway.test_process import on_loopback, ready, write_toml

__all__ = ["on_loopback"]  # a fixture

SECRET = "Marguerite Xylophone lives at 7 Quince Lane"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 4}
CHAT = "/v1/chat/completions"


class Collector:
    """An OTLP/HTTP receiver on loopback. While ``go_on`` is not set, it takes requests and never answers them."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.asked = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.asked.set()
                collector.go_on.wait()
                collector.paths.append(self.path)
                collector.headers.append({name.lower(): value for name, value in self.headers.items()})
                collector.bodies.append(body)
                try:
                    self.send_response(200)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                except OSError:
                    pass  # the gateway has given up

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.go_on.set()
        self.server.shutdown()
        self.server.server_close()

    def resources(self) -> list[Any]:
        return [group for body in self.bodies for group in ExportTraceServiceRequest.FromString(body).resource_spans]

    def spans(self) -> list[Any]:
        return [span for group in self.resources() for scope in group.scope_spans for span in scope.spans]


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture
def start(make_world: Callable[[Path], World], plan: Plan, tmp_path: Path) -> Iterator[Callable[[str], Running]]:
    """start(url): a gateway that sends its traces to the collector at ``url``; alice may use alpha."""
    servers: list[Running] = []

    def make(url: str) -> Running:
        world = make_world(tmp_path / "gateway")
        world.settings = world.settings.model_copy(update={"telemetry": Telemetry(otlp_endpoint=url)})
        world.coordinator.stage("alpha", 1, random_adapter(plan, 0))
        world.grant("alice", "alpha")
        servers.append(Running(world).start())
        servers[-1].await_adapters("alpha")
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


def attributes(values: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in values}


def sending() -> list[threading.Thread]:
    """The threads that empty a gateway's queue of spans."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("OtelBatchSpan")]


def test_a_collector_gets_the_spans_of_an_answer_and_no_text(
    collector: Collector, start: Callable[[str], Running]
) -> None:
    gateway = start(collector.url)
    answer = gateway.http("alice").post(CHAT, json=BODY | {"max_tokens": 30}).json()
    gateway.http("alice").post(CHAT, json=BODY | {"stream": True})
    gateway.stop()  # hands over what waits for the next batch
    assert set(collector.paths) == {"/v1/traces"}
    servers = [span for span in collector.spans() if span.name == f"POST {CHAT}"]
    assert sorted(span.name for span in collector.spans()) == sorted([f"POST {CHAT}", "queue", "prefill", "decode"] * 2)
    told = attributes(servers[0].attributes)
    assert told["gen_ai.usage.input_tokens"] == answer["usage"]["prompt_tokens"]
    assert told["gen_ai.usage.output_tokens"] == answer["usage"]["completion_tokens"]
    assert servers[0].trace_state == "" and not servers[0].events
    resource = attributes(collector.resources()[0].resource.attributes)
    assert resource["service.name"] == "seqr-gateway" and resource["service.version"]
    sent = b"".join(collector.bodies)
    said = answer["choices"][0]["message"]["content"]
    for word in ("Marguerite", "Xylophone", "Quince", "alpha", "alice", gateway.world.keys["alice"]):
        assert word.encode() not in sent
    assert len(said) < 5 or said.encode() not in sent


def test_opentelemetrys_own_variables_name_the_service_sign_in_and_sample(
    collector: Collector, start: Callable[[str], Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=north,deployment.environment.name=trial")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "api-key=let-me-in")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    gateway = start(collector.url)
    gateway.http("alice").get("/v1/models")
    sampled = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}
    gateway.http("alice").post(CHAT, json=BODY, headers=sampled)
    gateway.stop()
    resource = attributes(collector.resources()[0].resource.attributes)
    assert (resource["service.name"], resource["deployment.environment.name"]) == ("north", "trial")
    assert collector.headers[0]["api-key"] == "let-me-in"
    assert "GET /v1/models" not in {span.name for span in collector.spans()} and len(collector.spans()) == 4


def test_a_collector_that_hangs_costs_spans_and_neither_answers_nor_the_stop(
    collector: Collector, start: Callable[[str], Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(otlp, "EXPORT_S", 3600.0)  # so that nothing but the bound under test can end the waiting
    monkeypatch.setattr(otlp, "QUEUE_SPANS", 8)
    monkeypatch.setattr(otlp, "BATCH_SPANS", 4)
    monkeypatch.setattr(otlp, "FLUSH_S", 0.2)
    collector.go_on.clear()
    gateway = start(collector.url)
    client = gateway.http("alice")
    assert client.post(CHAT, json=BODY).status_code == 200
    assert collector.asked.wait(30)
    answers = [client.post(CHAT, json=BODY) for _ in range(8)]  # 32 spans, four times what the queue holds
    assert [answer.status_code for answer in answers] == [200] * 8
    gateway.stop()
    assert not gateway._thread.is_alive()
    assert collector.bodies == []
    collector.go_on.set()
    wait_until(lambda: not sending())  # the waiting spans are not tried any more
    assert len(collector.bodies) == 1


def test_spans_beyond_the_queue_are_dropped(
    collector: Collector, start: Callable[[str], Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"EXPORT_S": 60.0, "FLUSH_S": 60.0, "QUEUE_SPANS": 8, "BATCH_SPANS": 4}.items():
        monkeypatch.setattr(otlp, name, value)
    collector.go_on.clear()
    gateway = start(collector.url)
    client = gateway.http("alice")
    for _ in range(9):
        assert client.post(CHAT, json=BODY).status_code == 200
    assert collector.asked.wait(30)
    collector.go_on.set()
    gateway.stop()
    assert 8 <= len(collector.spans()) <= 16  # of 36: the queue, and what was on its way


def test_a_collector_that_is_not_there_is_told_of_once_and_serving_goes_on(
    start: Callable[[str], Running], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(otlp, "BATCH_MS", 10)
    monkeypatch.setattr(otlp, "EXPORT_S", 0.05)
    monkeypatch.setattr(otlp, "_once_a_minute", otlp.OnceAMinute())
    exporter = logging.getLogger("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    monkeypatch.setattr(exporter, "filters", [])
    port = free_port()
    gateway = start(f"http://127.0.0.1:{port}/")
    failed = []
    real = otlp.OTLPSpanExporter.export

    def counted(self: Any, spans: Any) -> Any:
        failed.append(real(self, spans))
        return failed[-1]

    monkeypatch.setattr(otlp.OTLPSpanExporter, "export", counted)
    while len(failed) < 3:
        assert gateway.http("alice").post(CHAT, json=BODY).status_code == 200
    told = [record.getMessage() for record in caplog.records if record.name == exporter.name]
    assert len(told) == 1 and "Failed to export spans batch" in told[0]


def test_a_trace_changes_nothing_that_other_code_in_the_process_uses(
    collector: Collector, start: Callable[[str], Running]
) -> None:
    start(collector.url).http("alice").post(CHAT, json=BODY)
    assert isinstance(get_tracer_provider(), ProxyTracerProvider)
    assert not get_current_span().get_span_context().is_valid


def test_a_gateway_of_its_own_takes_the_collector_from_the_environment_and_logs_the_trace(
    collector: Collector,
    make_world: Callable[[Path], World],
    on_loopback: Callable[[FakeCoordinator], str],
    tmp_path: Path,
) -> None:
    world = make_world(tmp_path / "gateway")
    port = write_toml(world, on_loopback(world.coordinator), log_format="json")
    url, directory = f"http://127.0.0.1:{port}", world.settings.directory
    environment = {"SEQR_GATEWAY_TELEMETRY__OTLP_ENDPOINT": f"{collector.url}/v1/traces", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "seqr", "gateway", "serve", "--dir", str(directory)]
    with (directory / "gateway.log").open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **environment})
    try:
        wait_until(lambda: ready(url), 120)
        headers = {"Authorization": f"Bearer {world.keys['carol']}"}
        assert httpx.post(f"{url}{CHAT}", json=BODY, headers=headers, timeout=30).status_code == 200
        process.terminate()
        process.wait(60)
    finally:
        process.kill()
        process.wait()
    [server] = [span for span in collector.spans() if span.name == f"POST {CHAT}"]
    assert collector.paths[0] == "/v1/traces"
    lines = [json.loads(line) for line in (directory / "gateway.log").read_text().splitlines()]
    [line] = [one for one in lines if one.get("route") == CHAT]
    assert (line["trace_id"], line["span_id"]) == (server.trace_id.hex(), server.span_id.hex())


# Without a collector


def python(script: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run ``script`` in a process of its own."""
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)


def test_without_a_collector_nothing_of_opentelemetry_is_imported(
    make_world: Callable[[Path], World], tmp_path: Path
) -> None:
    world = make_world(tmp_path / "gateway")
    write_toml(world, "http://127.0.0.1:1")
    script = f"""
        import asyncio, sys
        import httpx
        import inference_gateway.serving
        from inference_gateway.app import create_app
        from inference_gateway.service import Service
        from inference_gateway.settings import load_settings

        async def ask():
            service = Service(load_settings({str(world.settings.directory)!r}))
            transport = httpx.ASGITransport(create_app(service))
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
                print((await client.get("/v1/models")).status_code)
            await service.stop()

        asyncio.run(ask())
        print(any(name.split(".")[0] == "opentelemetry" for name in sys.modules))
    """
    heavy = "import inference_gateway.engine.transformers_engine, inference_gateway.grammar\n"
    off = python(heavy + textwrap.dedent(script))
    assert off.stdout.split() == ["401", "False"], off.stderr
    on = python(script, SEQR_GATEWAY_TELEMETRY__OTLP_ENDPOINT="http://127.0.0.1:1", OTEL_TRACES_SAMPLER="always_off")
    assert on.stdout.split() == ["401", "True"], on.stderr


def test_a_collector_without_the_packages_is_refused_with_what_to_install(
    make_world: Callable[[Path], World], tmp_path: Path
) -> None:
    world = make_world(tmp_path / "gateway")
    write_toml(world, "http://127.0.0.1:1", telemetry="TABLE")
    text = world.settings.config_file.read_text().replace('telemetry = "TABLE"\n', "")
    world.settings.config_file.write_text(text + '[telemetry]\notlp_endpoint = "http://127.0.0.1:4318"\n')
    refused = python(f"""
        import sys
        sys.modules["opentelemetry"] = None  # as where it is not installed
        from seqr.cli import main
        main(["gateway", "serve", "--dir", {str(world.settings.directory)!r}])
    """)
    assert refused.returncode == 1
    assert refused.stderr.strip() == (
        "error[telemetry_not_installed]: telemetry.otlp_endpoint is set, but OpenTelemetry is not installed; run "
        "pip install '.[otel]' in the clone of seqr, or remove the setting"
    )


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:4318", "ftp://host", "http://", "http://host:pepper", "http://ada:pepper@host", "http://h?k=pepper"],
)
def test_an_endpoint_that_is_none_is_refused_and_not_repeated(tmp_path: Path, url: str) -> None:
    (tmp_path / "gateway.toml").write_text(f'[telemetry]\notlp_endpoint = "{url}"\n')
    with pytest.raises(
        Exception, match=r"telemetry\.otlp_endpoint: .* must be a URL like http://127\.0\.0\.1:4318"
    ) as told:
        load_settings(tmp_path)
    assert "pepper" not in str(told.value)
