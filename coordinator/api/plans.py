"""/v1/plans: the signed documents that silos train under."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response

from coordinator import plans
from coordinator.api.auth import Admin, Reader
from coordinator.api.state import Services, services
from coordinator.db import reading, writing

router = APIRouter(prefix="/v1/plans", tags=["plans"])
S = Annotated[Services, Depends(services)]


async def _body(request: Request) -> bytes:
    return await request.body()


@router.post("", status_code=201)
def store(
    envelope: Annotated[bytes, Depends(_body)], caller: Admin, s: S, reason: str = "a new plan"
) -> dict[str, Any]:
    """Store a plan signed with the coordinator's key (the body is its DSSE envelope) and make it current."""
    with writing(s.coordinator.engine) as connection:
        plan = plans.store(connection, envelope, s.coordinator.key.public, caller.user_id, reason)
    return {"plan_id": plan.plan_id, "current": True}


@router.get("")
def listing(_caller: Reader, s: S) -> dict[str, Any]:
    """All plans, newest first, and which one is current."""
    with reading(s.coordinator.engine) as connection:
        return {"current": plans.current_id(connection), "plans": [dict(row) for row in plans.listing(connection)]}


@router.get("/current")
def current(_caller: Reader, s: S) -> Response:
    """The signed plan that is current."""
    with reading(s.coordinator.engine) as connection:
        return _envelope(plans.envelope(connection, plans.current(connection)))


@router.get("/{plan_id}")
def one(plan_id: str, s: S) -> Response:
    """A signed plan. Open to whoever knows its id: a silo has to read it, and has no key."""
    with reading(s.coordinator.engine) as connection:
        return _envelope(plans.envelope(connection, plan_id))


def _envelope(envelope: bytes) -> Response:
    return Response(envelope, media_type="application/json")
