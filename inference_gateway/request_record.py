"""What is known of the HTTP request at hand, for its log line and for headers; never any text of the user's."""

import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field

from inference_gateway.tracing import RequestTrace


@dataclass
class RequestRecord:
    """``fields`` go into the log line, ``headers`` onto the response; ``error_code``: what the caller was told last.

    ``has_place``: an answer to it has left the queue.
    """

    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    fields: dict[str, str | int | float] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    error_code: str | None = None
    has_place: bool = False
    trace: RequestTrace = field(default_factory=RequestTrace)

    @property
    def ids(self) -> dict[str, str]:
        """What names this request in every log line about it."""
        return {"request_id": self.request_id, **self.trace.ids}


_current: ContextVar[RequestRecord | None] = ContextVar("seqr_request_record", default=None)


def begin(record: RequestRecord) -> None:
    """Make ``record`` that of this context and of the tasks started in it."""
    _current.set(record)


def current() -> RequestRecord:
    """This request's record; outside any request, one that nobody reads."""
    return _current.get() or RequestRecord()
