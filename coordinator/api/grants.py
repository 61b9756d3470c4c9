"""/v1/grants and /v1/audit: who may use which silo, and who changed that."""

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Response

from coordinator.api.auth import Admin, Auditor
from coordinator.api.bodies import GrantBody, WithReason
from coordinator.api.etag import Expected, Preview, answer, change, read
from coordinator.api.state import Services, services
from policy import audit, listing
from policy.diff import Diff

router = APIRouter(prefix="/v1", tags=["policy"])
S = Annotated[Services, Depends(services)]


@router.get("/grants")
def grants(
    _caller: Admin, s: S, response: Response, silo_id: str | None = None, revoked: bool = False
) -> list[dict[str, Any]]:
    """All grants, in the order they were made."""
    return read(s, response, lambda connection: listing.grants(connection, silo_id=silo_id, revoked=revoked))


@router.post("/grants", status_code=201)
def add_grant(
    body: GrantBody, caller: Admin, s: S, response: Response, expected: Expected, preview: Preview = False
) -> dict[str, Any]:
    """Allow or deny a silo to a user or group; with dry_run, say who would gain and lose what."""
    how = change(caller, body.reason, expected)
    done = s.coordinator.policy.add_grant(
        body.subject,
        body.silo_id,
        body.effect,
        not_before=body.not_before,
        expires_at=body.expires_at,
        dry_run=preview,
        **how,
    )
    if isinstance(done, Diff):
        return answer(response, done)
    return answer(response, done.policy_version, grant_id=done.grant_id)


@router.delete("/grants/{grant_id}")
def revoke_grant(
    grant_id: str,
    body: WithReason,
    caller: Admin,
    s: S,
    response: Response,
    expected: Expected,
    preview: Preview = False,
) -> dict[str, Any]:
    """Revoke a grant; the gateway cuts streams that rest on it."""
    how = change(caller, body.reason, expected)
    return answer(response, s.coordinator.policy.revoke_grant(grant_id, dry_run=preview, **how), grant_id=grant_id)


@router.get("/audit")
def audit_rows(
    _caller: Auditor,
    s: S,
    response: Response,
    after: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> list[dict[str, Any]]:
    """Audit rows with a number above ``after``, oldest first."""
    return read(s, response, lambda connection: [asdict(row) for row in audit.entries(connection, after, limit)])


@router.get("/audit/head")
def audit_head(_caller: Auditor, s: S, response: Response) -> dict[str, Any]:
    """The number and hash of the last row: keep it elsewhere, it is what makes truncation visible."""
    return read(s, response, lambda connection: asdict(audit.head(connection)))
