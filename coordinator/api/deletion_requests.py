"""/v1/deletion-requests: filing, following and proving the deletion of a person's records at one silo."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response

from coordinator import requests
from coordinator.api.auth import Officer, own_silos, require_own_silo
from coordinator.api.bodies import DeletionBody, WithReason
from coordinator.api.state import Services, services
from coordinator.db import now, reading
from policy.keys import Principal

router = APIRouter(prefix="/v1/deletion-requests", tags=["deletion requests"])
S = Annotated[Services, Depends(services)]


@router.post("", status_code=201)
def file(body: DeletionBody, caller: Officer, s: S) -> dict[str, Any]:
    """File a request. When this answers, the silo is in quarantine already."""
    require_own_silo(s, caller, body.silo_id)
    request_id = requests.file(
        s.coordinator, body.silo_id, body.subject, body.requested_by, body.reason, caller.user_id
    )
    s.driver.quarantine_at_once(request_id)
    return _view(s, request_id)


@router.get("")
def listing(caller: Officer, s: S, silo_id: str | None = None) -> list[dict[str, Any]]:
    """The latest requests, newest first."""
    with reading(s.coordinator.engine) as connection:
        found = requests.listing(connection, silo_id)
        visible = own_silos(s, caller, *{row["silo_id"] for row in found})
        moment = now()
        return [requests.view(connection, row, moment) for row in found if row["silo_id"] in visible]


@router.get("/{request_id}")
def one(request_id: str, caller: Officer, s: S) -> dict[str, Any]:
    """One request with its history."""
    _require_mine(s, caller, request_id)
    return _view(s, request_id)


@router.get("/{request_id}/receipt")
def receipt(request_id: str, caller: Officer, s: S) -> Response:
    """The signed receipt (a DSSE envelope), once the request is certified."""
    _require_mine(s, caller, request_id)
    with reading(s.coordinator.engine) as connection:
        envelope = requests.receipt(connection, request_id)
    name = f'attachment; filename="receipt-{request_id}.json"'
    return Response(envelope, media_type="application/json", headers={"Content-Disposition": name})


@router.post("/{request_id}/retry")
def retry(request_id: str, body: WithReason, caller: Officer, s: S) -> dict[str, Any]:
    """Give a failed request to the silo once more."""
    _require_mine(s, caller, request_id)
    requests.retry(s.coordinator, request_id, caller.user_id, body.reason)
    return _view(s, request_id)


@router.post("/{request_id}/withdraw")
def withdraw(request_id: str, body: WithReason, caller: Officer, s: S) -> dict[str, Any]:
    """End a request that no silo has been told of yet."""
    _require_mine(s, caller, request_id)
    requests.withdraw(s.coordinator, request_id, caller.user_id, body.reason)
    return _view(s, request_id)


def _require_mine(s: Services, caller: Principal, request_id: str) -> None:
    with reading(s.coordinator.engine) as connection:
        row = requests.get(connection, request_id)
    require_own_silo(s, caller, row["silo_id"])


def _view(s: Services, request_id: str) -> dict[str, Any]:
    with reading(s.coordinator.engine) as connection:
        row = requests.get(connection, request_id)
        return {**requests.view(connection, row, now()), "history": requests.history(connection, request_id)}
