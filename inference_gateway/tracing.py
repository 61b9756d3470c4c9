"""What a trace is told of a request. The classes here pass nothing on; ``inference_gateway.otlp`` has those that do.

Only that module imports OpenTelemetry, and only where an operator has named a collector is it imported itself.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from starlette.types import Scope

from inference_gateway.engine.base import Shares
from inference_gateway.errors import TelemetryNotInstalled

if TYPE_CHECKING:
    from inference_gateway.api.asking import Asked
    from inference_gateway.request_record import RequestRecord
    from inference_gateway.settings import Settings


class AnswerTrace:
    """One answer, from its place in line to its end."""

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While the answer waits for a place; its prompt is read from then on."""
        yield

    def tokens(self, count: int) -> None:
        """``count`` tokens have come."""

    def ended(self, reason: str, shares: Shares | None) -> None:
        """``stop``, ``length``, ``abort``, or the code of an error; ``shares`` where the operator counts them all."""


class RequestTrace:
    """One HTTP request. ``ids`` name its trace and span in log lines."""

    ids: Mapping[str, str] = {}

    def asked(self, asked: "Asked", stream: bool) -> None:
        """The body has been understood and what it may use is decided."""

    def answer(self) -> AnswerTrace:
        """One more answer begins to wait."""
        return AnswerTrace()

    def end(self, method: str, route: str, status: int, record: "RequestRecord") -> None:
        """The response is over; ``status`` 0 where there was none."""


class Tracing:
    """Makes the trace of every request."""

    def request(self, scope: Scope) -> RequestTrace:
        """A request with this ASGI scope has come."""
        return RequestTrace()

    def stop(self) -> None:
        """Hand over what has not been yet, within a bound. Blocks."""


def tracing_of(settings: "Settings") -> Tracing:
    """What the settings ask for. Raises TelemetryNotInstalled where the packages for it are missing."""
    endpoint = settings.telemetry.otlp_endpoint
    if not endpoint:
        return Tracing()
    try:
        from inference_gateway.otlp import tracing_to
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "opentelemetry":
            raise
        raise TelemetryNotInstalled(
            "telemetry.otlp_endpoint is set, but OpenTelemetry is not installed; run pip install '.[otel]' in the "
            "clone of seqr, or remove the setting"
        ) from None
    return tracing_to(endpoint)
