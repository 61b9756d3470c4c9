"""/v1/gateway: what a gateway polls, fetches and reports. Needs a key with the scope gateway."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response

from coordinator import plans, purging, revisions
from coordinator.api.auth import Gateway
from coordinator.api.bodies import AdmissionBody, PurgeBody, QuarantineBody
from coordinator.api.state import Services, services
from coordinator.db import reading
from seqr.canonical import canonical_json

router = APIRouter(prefix="/v1/gateway", tags=["gateway"])
S = Annotated[Services, Depends(services)]


@router.get("/plan")
def plan(_caller: Gateway, s: S) -> Response:
    """The signed plan that is current."""
    with reading(s.coordinator.engine) as connection:
        return Response(plans.envelope(connection, plans.current(connection)), media_type="application/json")


@router.get("/revisions")
def listing(_caller: Gateway, s: S) -> list[dict[str, Any]]:
    """Every staged, active and retired revision, with what intake has to expect of it."""
    with reading(s.coordinator.engine) as connection:
        return revisions.for_gateways(connection)


@router.get("/revisions/{revision_id}/bundle")
def bundle(revision_id: str, _caller: Gateway, s: S) -> Response:
    """The sealed bundle, byte for byte as the silo sent it."""
    return Response(revisions.bundle(s.coordinator, revision_id), media_type="application/octet-stream")


@router.post("/revisions/{revision_id}/admitted")
def admitted(revision_id: str, body: AdmissionBody, caller: Gateway, s: S) -> dict[str, Any]:
    """The revision passed intake: it is active now, and those it replaces are to be purged."""
    retired = revisions.admit(s.coordinator, revision_id, body.adapter_digest, caller.user_id)
    return {"state": "active", "retired": retired}


@router.post("/revisions/{revision_id}/quarantined")
def quarantined(revision_id: str, body: QuarantineBody, caller: Gateway, s: S) -> dict[str, Any]:
    """The revision did not pass intake."""
    revisions.quarantine(s.coordinator, revision_id, body.code, body.message, caller.user_id)
    return {"state": "quarantined"}


@router.post("/revisions/{revision_id}/purged")
def purged(revision_id: str, body: PurgeBody, _caller: Gateway, s: S) -> dict[str, Any]:
    """The gateway swears, under its own signature, that the retired revision is gone."""
    return {"state": purging.acknowledge_purge(s.coordinator, revision_id, canonical_json(body.acknowledgement))}
