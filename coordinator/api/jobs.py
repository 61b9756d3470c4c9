"""/v1/jobs: what silos are told to do, and what became of it."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends

from coordinator import job_queue
from coordinator.api.auth import Admin, Reader
from coordinator.api.bodies import JobBody, WithReason
from coordinator.api.state import Services, services
from coordinator.db import Row, reading, writing

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])
S = Annotated[Services, Depends(services)]

_SHOWN = (
    *("job_id", "silo_id", "plan_id", "kind", "state", "revision", "request_id", "attempts", "created_by"),
    *("created_at", "dispatched_at", "finished_at", "code", "message"),
)


@router.post("", status_code=202)
def create(body: JobBody, caller: Admin, s: S) -> dict[str, Any]:
    """Queue a job; the silo gets it as soon as it is connected."""
    with writing(s.coordinator.engine) as connection:
        job_id = job_queue.enqueue(connection, body.silo_id, body.kind, caller.user_id, body.reason)
        return _view(job_queue.get(connection, job_id))


@router.get("")
def listing(_caller: Reader, s: S, silo_id: str | None = None) -> list[dict[str, Any]]:
    """The latest jobs, newest first."""
    with reading(s.coordinator.engine) as connection:
        return [_view(job) for job in job_queue.listing(connection, silo_id)]


@router.get("/{job_id}")
def one(job_id: str, _caller: Reader, s: S) -> dict[str, Any]:
    """One job."""
    with reading(s.coordinator.engine) as connection:
        return _view(job_queue.get(connection, job_id))


@router.post("/{job_id}/cancel")
def cancel(job_id: str, body: WithReason, caller: Admin, s: S) -> dict[str, Any]:
    """Give up a job that is not over; a reply that still comes is dropped."""
    with writing(s.coordinator.engine) as connection:
        job_queue.cancel(connection, job_id, caller.user_id, body.reason)
        return _view(job_queue.get(connection, job_id))


def _view(job: Row) -> dict[str, Any]:
    return {name: job[name] for name in _SHOWN}
