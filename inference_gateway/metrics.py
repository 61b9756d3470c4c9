"""Prometheus metrics: vLLM's names where vLLM has the metric, ``seqr_`` where it is ours.

No label holds a user, a key or a text. Labels are bounded: the model, routes, statuses, error codes, and silos, which
only the operator may see.
"""

import time
from collections import Counter as Tally
from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from inference_gateway.engine.base import EngineInfo, Shares
from inference_gateway.errors import RateLimited, Refused

if TYPE_CHECKING:
    from inference_gateway.service import Service

# Seconds: from a kernel launch to a long answer on a slow machine.
FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
SLOW = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
SIZES = tuple(float(2**power) for power in range(0, 18))
MODEL = ("model_name",)
SUCCESSES = ("stop", "length", "abort")


class Metrics:
    """One gateway's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._first_token = self._histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", SLOW)
        self._between = self._histogram("vllm:inter_token_latency_seconds", "Between two tokens of an answer.", FAST)
        self._per_token = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time per token of an answer after its first.", FAST
        )
        self._whole = self._histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.", SLOW)
        self._queue = self._histogram("vllm:request_queue_time_seconds", "Wait for a place in the engine.", SLOW)
        self._prefill = self._histogram("vllm:request_prefill_time_seconds", "Place to first token.", SLOW)
        self._decode = self._histogram("vllm:request_decode_time_seconds", "First to last token.", SLOW)
        self._prompt_size = self._histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", SIZES)
        self._answer_size = self._histogram("vllm:request_generation_tokens", "Tokens of an answer.", SIZES)
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Tokens of prompts that were read.", MODEL)
        self._tokens = self._counter("vllm:generation_tokens", "Tokens of answers.", MODEL)
        self._success = self._counter(
            "vllm:request_success", "Answers by end: stop, length, or abort by the client.", (*MODEL, "finished_reason")
        )
        self._failed = self._counter("seqr_answers_failed", "Answers that ended with an error, by code.", ("code",))
        self._refused = self._counter("seqr_requests_refused", "Requests not admitted, by limit or code.", ("reason",))
        self._responses = self._counter("seqr_http_responses", "HTTP responses.", ("route", "method", "status"))
        self._choices = self._counter(
            "seqr_routing_choices",
            "(token, module) choices by silo; empty for the base model alone.",
            ("silo",),
        )

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        return Histogram(name, text, MODEL, buckets=tuple(buckets), registry=self.registry)

    def _counter(self, name: str, text: str, labels: Iterable[str]) -> Counter:
        return Counter(name, text, tuple(labels), registry=self.registry)

    def watch(self, service: "Service") -> None:
        """Add what is read from ``service`` at every scrape."""
        self.registry.register(_State(service))

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)

    def refused(self, refusal: Refused) -> None:
        reason = refusal.limit if isinstance(refusal, RateLimited) else refusal.code
        self._refused.labels(reason).inc()

    def responded(self, route: str, method: str, status: int) -> None:
        self._responses.labels(route, method, str(status)).inc()

    def admitted(self, model: str, waited: float) -> None:
        self._queue.labels(model).observe(waited)

    def answer(self, model: str, arrived: float, prompt_tokens: int) -> "Answer":
        """The measuring of one answer whose request arrived at ``time.perf_counter()`` = ``arrived``."""
        return Answer(self, model, arrived, prompt_tokens)


class Answer:
    """One answer as it is generated. Times are those at which its reader takes the tokens."""

    def __init__(self, metrics: Metrics, model: str, arrived: float, prompt_tokens: int):
        self._metrics = metrics
        self._model = model
        self._arrived = arrived
        self._began = time.perf_counter()
        self._prompt_tokens = prompt_tokens
        self._first: float | None = None
        self._last = 0.0
        self._count = 0

    @property
    def first_token_ms(self) -> float | None:
        """Milliseconds from arrival to the first token."""
        return None if self._first is None else round(1000 * (self._first - self._arrived), 1)

    def tokens(self, count: int) -> None:
        """``count`` tokens have come."""
        now, metrics, model = time.perf_counter(), self._metrics, self._model
        if self._first is None:
            self._first = now
            metrics._first_token.labels(model).observe(now - self._arrived)
            metrics._prefill.labels(model).observe(now - self._began)
            metrics._prompt_tokens.labels(model).inc(self._prompt_tokens)
        else:
            metrics._between.labels(model).observe(now - self._last)
        self._last = now
        self._count += count
        metrics._tokens.labels(model).inc(count)

    def shares(self, shares: Shares | None) -> None:
        """Which silos shaped the answer, when it was counted."""
        if shares is None:
            return
        for silo, count in shares.total.items():
            self._metrics._choices.labels(silo).inc(count)
        self._metrics._choices.labels("").inc(shares.choices - sum(shares.total.values()))

    def ended(self, reason: str) -> None:
        """``stop``, ``length``, ``abort``, or the code of an error."""
        metrics, model = self._metrics, self._model
        if reason not in SUCCESSES:
            metrics._failed.labels(reason).inc()
            return
        metrics._success.labels(model, reason).inc()
        if self._first is None or reason == "abort":
            return
        metrics._whole.labels(model).observe(self._last - self._arrived)
        metrics._decode.labels(model).observe(self._last - self._first)
        metrics._prompt_size.labels(model).observe(self._prompt_tokens)
        metrics._answer_size.labels(model).observe(self._count)
        if self._count > 1:
            metrics._per_token.labels(model).observe((self._last - self._first) / (self._count - 1))


class _State(Collector):
    """What the service holds at the moment of a scrape."""

    def __init__(self, service: "Service"):
        self._service = service

    def describe(self) -> Iterable[Metric]:
        return ()  # nothing to be asked while the service is being built

    def collect(self) -> Iterable[Metric]:
        service = self._service
        yield GaugeMetricFamily("seqr_ready", "1 when the gateway can serve.", value=int(service.problem() is None))
        serving = service.loaded
        if serving is None:
            return
        queue, info, status = service.admission.queue, serving.engine.info(), serving.intake.status
        model = serving.plan.base_model
        yield _gauge("vllm:num_requests_running", "Answers in the engine.", model, queue.running)
        yield _gauge("vllm:num_requests_waiting", "Requests that wait for a place.", model, queue.waiting)
        yield from _engine(info, model)
        yield GaugeMetricFamily("seqr_library_version", "Changes of the library so far.", value=info.library_version)
        yield GaugeMetricFamily("seqr_library_adapters", "Adapters that requests can use.", value=len(info.adapters))
        yield CounterMetricFamily("seqr_adapters_loaded", "Adapters taken in after their checks.", value=status.loaded)
        yield CounterMetricFamily(
            "seqr_adapters_removed", "Adapters revoked: retired, quarantined or deleted.", value=status.removed
        )
        refused = CounterMetricFamily("seqr_intake_refused", "Revisions that intake refused, by code.", labels=["code"])
        for code, count in sorted(Tally(status.refused.values()).items()):
            refused.add_metric([code], count)
        yield refused


def _gauge(name: str, text: str, model: str, value: float) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=MODEL)
    family.add_metric([model], value)
    return family


def _total(name: str, text: str, model: str, value: float) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=MODEL)
    family.add_metric([model], value)
    return family


def _engine(info: EngineInfo, model: str) -> Iterable[Metric]:
    used = info.kv_blocks_used / max(1, info.kv_blocks)
    yield _gauge("vllm:kv_cache_usage_perc", "KV cache in use; 1 is all of it.", model, used)
    yield _total("vllm:num_preemptions", "Requests that a full cache made start again.", model, info.preemptions)
    yield _total("vllm:prefix_cache_queries", "Prompt tokens looked up.", model, info.prefix_queries)
    yield _total("vllm:prefix_cache_hits", "Prompt tokens found.", model, info.prefix_hits)
    yield CounterMetricFamily("seqr_engine_steps", "Forward passes.", value=info.steps)
    yield CounterMetricFamily("seqr_engine_step_seconds", "Time in forward passes.", value=info.step_seconds)
    yield GaugeMetricFamily("seqr_engine_alive", "1 while the engine's worker lives.", value=int(info.alive))
    yield GaugeMetricFamily("seqr_permission_rows", "Permitted sets in the table.", value=info.permission_rows)
