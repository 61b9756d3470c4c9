"""Traces of requests, sent to an OpenTelemetry collector by OTLP over HTTP.

A span holds numbers, codes and names of ours: nothing that a caller wrote (no path, header, ``tracestate`` or name of a
model, which can be a silo's), no user, no key. Attributes have the names of OpenTelemetry's semantic conventions for
HTTP spans (1.41) and generative AI (github.com/open-telemetry/semantic-conventions-genai); ours begin with ``seqr.``.
"""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue
from starlette.datastructures import Headers
from starlette.types import Scope

from inference_gateway.engine.base import Shares
from inference_gateway.metrics import SUCCESSES
from inference_gateway.request_record import RequestRecord
from inference_gateway.tracing import AnswerTrace, RequestTrace, Tracing

if TYPE_CHECKING:
    from inference_gateway.api.asking import Asked

log = logging.getLogger(__name__)

# Spans that wait for the collector; beyond them the oldest are dropped.
QUEUE_SPANS = 2048
BATCH_SPANS = 256
BATCH_MS = 1000
EXPORT_S = 5.0
FLUSH_S = 3.0
TRACES_PATH = "/v1/traces"
OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}


class OnceAMinute(logging.Filter):
    """Lets one line through, then none for a minute: a collector that is away is told of at every batch."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + 60
        return True


_once_a_minute = OnceAMinute()


def tracing_to(endpoint: str) -> "OtlpTracing":
    """Traces for the collector at the URL ``endpoint``, by a provider of this gateway's own, not the process's.

    The queue is bounded and a thread empties it, so a collector that is slow or away costs spans and nothing else.
    """
    logging.getLogger(OTLPSpanExporter.__module__).addFilter(_once_a_minute)
    url = endpoint.rstrip("/").removesuffix(TRACES_PATH) + TRACES_PATH
    ours = Resource.create({"service.name": "seqr-gateway", "service.version": version("seqr")})
    unmeasured = NoOpMeterProvider()
    provider = TracerProvider(
        resource=ours.merge(OTELResourceDetector().detect()),
        shutdown_on_exit=False,
        meter_provider=unmeasured,
    )
    exporter = OTLPSpanExporter(url, timeout=EXPORT_S, meter_provider=unmeasured)
    provider.add_span_processor(
        BatchSpanProcessor(
            exporter,
            max_queue_size=QUEUE_SPANS,
            schedule_delay_millis=BATCH_MS,
            max_export_batch_size=BATCH_SPANS,
            meter_provider=unmeasured,
        )
    )
    return OtlpTracing(provider, exporter)


class OtlpTracing(Tracing):
    """Traces by way of ``provider``, whose spans ``exporter`` sends."""

    def __init__(self, provider: TracerProvider, exporter: SpanExporter):
        self._provider = provider
        self._exporter = exporter
        self._tracer = provider.get_tracer("inference_gateway")

    def request(self, scope: Scope) -> RequestTrace:
        return _Request(self._tracer, scope)

    def stop(self) -> None:
        closing = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        closing.start()
        closing.join(FLUSH_S)
        if closing.is_alive():
            log.warning("the collector did not take the last spans within %g s; they may be lost", FLUSH_S)
            self._exporter.shutdown()  # what waits still is not tried


class _Request(RequestTrace):
    """The server span of a request. Its parent is the caller's span, if the caller names one."""

    def __init__(self, tracer: Tracer, scope: Scope):
        self._tracer = tracer
        parent = Context()
        named = Headers(scope=scope).getlist("traceparent")
        if len(named) == 1:
            parent = TraceContextTextMapPropagator().extract({"traceparent": named[0]}, parent)
        scheme = {"url.scheme": scope.get("scheme", "http")}
        self._span = tracer.start_span("HTTP", parent, kind=SpanKind.SERVER, attributes=scheme)
        self._within = set_span_in_context(self._span, Context())
        self._stream = False
        self._answers: list[_Answer] = []
        context = self._span.get_span_context()
        self.ids = {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}

    def asked(self, asked: "Asked", stream: bool) -> None:
        self._stream = stream
        request, sampling = asked.request, asked.request.sampling
        attributes: dict[str, AttributeValue] = {
            "gen_ai.request.model": asked.serving.plan.base_model,
            "gen_ai.request.stream": stream,
            "gen_ai.request.max_tokens": request.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "seqr.routing.mode": request.mode,
            "seqr.policy.version": asked.decision.policy_version,
            "seqr.library.version": asked.library_version,
            "seqr.silos.permitted": len(asked.decision.silos),
            "seqr.silos.used": len(asked.silos),
        }
        if len(asked.requests) > 1:
            attributes["gen_ai.request.choice.count"] = len(asked.requests)
        if sampling.seed is not None:
            attributes["gen_ai.request.seed"] = sampling.seed
        self._span.set_attributes(attributes)

    def answer(self) -> AnswerTrace:
        answer = _Answer(self._tracer, self._within, len(self._answers))
        self._answers.append(answer)
        return answer

    def end(self, method: str, route: str, status: int, record: RequestRecord) -> None:
        span, known = self._span, method != "other"
        span.update_name(" ".join((method if known else "HTTP", *((route,) if route != "-" else ()))))
        span.set_attribute("http.request.method", method if known else "_OTHER")
        if route != "-":
            span.set_attribute("http.route", route)
        if status:
            span.set_attribute("http.response.status_code", status)
        if route in OPERATIONS:
            span.set_attributes({"gen_ai.operation.name": OPERATIONS[route], "gen_ai.provider.name": "seqr"})
            self._usage(record)
        if record.error_code is not None:
            span.set_attribute("error.type", record.error_code)
        # A refusal before anything was sent is the caller's error; one in the middle of a stream is an answer lost.
        if status >= 500 or (status < 400 and record.error_code is not None):
            span.set_status(Status(StatusCode.ERROR))
        span.end()

    def _usage(self, record: RequestRecord) -> None:
        names = {"prompt_tokens": "gen_ai.usage.input_tokens", "completion_tokens": "gen_ai.usage.output_tokens"}
        self._span.set_attributes({name: record.fields[ours] for ours, name in names.items() if ours in record.fields})
        if self._stream and "first_token_ms" in record.fields:
            seconds = float(record.fields["first_token_ms"]) / 1000
            self._span.set_attribute("gen_ai.response.time_to_first_chunk", seconds)
        reasons = [answer.reason for answer in self._answers if answer.reason is not None]
        if reasons:
            self._span.set_attribute("gen_ai.response.finish_reasons", reasons)


class _Answer(AnswerTrace):
    """The spans ``queue``, ``prefill`` (from its place to its first token) and ``decode`` of an answer, in turn."""

    def __init__(self, tracer: Tracer, within: Context, index: int):
        self._tracer = tracer
        self._within = within
        self._index = index
        self._span = self._begin("queue")
        self._count = 0
        # How it ended, once it has had a place: ``error`` for any error.
        self.reason: str | None = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            code = getattr(error, "code", None)
            if isinstance(code, str):
                _fail(self._span, code)
            self._span.end()
            raise
        self._next("prefill")

    def tokens(self, count: int) -> None:
        if count and self._count == 0:
            self._next("decode")
        self._count += count

    def ended(self, reason: str, shares: Shares | None) -> None:
        self.reason = reason if reason in SUCCESSES else "error"
        self._span.set_attributes({"seqr.answer.tokens": self._count, "seqr.answer.reason": reason})
        if shares is not None:
            silos = {silo: count for silo, count in sorted(shares.total.items()) if count}
            base = shares.choices - sum(silos.values())
            self._span.set_attribute("seqr.attribution.silos", [*silos, ""])
            self._span.set_attribute("seqr.attribution.choices", [*silos.values(), base])
        if reason not in SUCCESSES:
            _fail(self._span, reason)
        self._span.end()

    def _begin(self, name: str) -> Span:
        return self._tracer.start_span(name, self._within, attributes={"seqr.answer.index": self._index})

    def _next(self, name: str) -> None:
        self._span.end()
        self._span = self._begin(name)


def _fail(span: Span, code: str) -> None:
    span.set_attribute("error.type", code)
    span.set_status(Status(StatusCode.ERROR))
