"""/v1/silos: asking to join, and the admin's decision."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends

from coordinator import enrolment, silos
from coordinator.api.auth import Admin, Reader
from coordinator.api.bodies import ApprovalBody, EnrolmentBody, RejectionBody, WithReason
from coordinator.api.state import Services, services
from coordinator.db import reading
from coordinator.errors import CoordinatorError
from seqr.canonical import canonical_json

router = APIRouter(prefix="/v1/silos", tags=["silos"])
S = Annotated[Services, Depends(services)]


@router.post("/enrolments", status_code=202)
def enrol(body: EnrolmentBody, s: S) -> dict[str, Any]:
    """Ask to join. Needs no key: the request is signed with the silo's own, and changes nothing until approved."""
    request = enrolment.Enrolment(
        body.silo_id, body.display_name, body.signing_key, body.node_key, canonical_json(body.proof)
    )
    return enrolment.enrol(s.coordinator.engine, request, s.coordinator.settings.max_pending_enrolments)


@router.get("")
def listing(_caller: Reader, s: S) -> list[dict[str, Any]]:
    """Enrolled silos and those that ask to be."""
    with reading(s.coordinator.engine) as connection:
        return silos.listing(connection)


@router.post("/{silo_id}/approve")
def approve(silo_id: str, body: ApprovalBody, caller: Admin, s: S) -> dict[str, Any]:
    """Let the silo with this fingerprint in: it can connect, and admins can grant it."""
    enrolment.approve(s.coordinator.engine, silo_id, body.fingerprint, caller.user_id, body.reason)
    return _settle(s, silo_id, "approved")


@router.post("/{silo_id}/reject")
def reject(silo_id: str, body: RejectionBody, caller: Admin, s: S) -> dict[str, Any]:
    """Refuse the silo's pending requests, or the one with the given fingerprint."""
    count = enrolment.reject(s.coordinator.engine, silo_id, caller.user_id, body.reason, body.fingerprint)
    return {"silo_id": silo_id, "rejected": count}


@router.post("/{silo_id}/suspend")
def suspend(silo_id: str, body: WithReason, caller: Admin, s: S) -> dict[str, Any]:
    """Shut the silo out: nobody may use it, and it is disconnected."""
    silos.suspend(s.coordinator.engine, silo_id, caller.user_id, body.reason)
    return _settle(s, silo_id, "suspended")


def _settle(s: Services, silo_id: str, status: str) -> dict[str, Any]:
    """Carry the decision to policy and SuperLink at once; what does not answer now is retried by the loop."""
    s.reconciler.sync_policy(silo_id)
    try:
        s.reconciler.sync_nodes(silo_id)
    except CoordinatorError as error:
        return {"silo_id": silo_id, "status": status, "node_registered": False, "why": str(error)}
    return {"silo_id": silo_id, "status": status, "node_registered": status == "approved"}
