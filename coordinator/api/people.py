"""/v1/users and /v1/groups: thin over PolicyStore. Writes need If-Match with the policy version and a reason."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response

from coordinator.api.auth import Admin, Auditor
from coordinator.api.bodies import GroupBody, MemberBody, UserBody, UserChangeBody, WithReason
from coordinator.api.etag import Expected, Preview, answer, change, read
from coordinator.api.state import Services, services
from coordinator.db import now
from coordinator.errors import BodyInvalid
from policy import decision, listing
from policy.explain import explain

router = APIRouter(prefix="/v1", tags=["policy"])
S = Annotated[Services, Depends(services)]


@router.get("/users")
def users(_caller: Admin, s: S, response: Response) -> list[dict[str, Any]]:
    """Everybody, with roles and direct groups."""
    return read(s, response, listing.users)


@router.post("/users", status_code=201)
def create_user(body: UserBody, caller: Admin, s: S, response: Response, expected: Expected) -> dict[str, Any]:
    """Create a user without any permission. API keys are issued with `seqr policy key create`, beside the database."""
    how = change(caller, body.reason, expected)
    version = s.coordinator.policy.create_user(body.user_id, body.roles, body.display_name, **how)
    return answer(response, version, user_id=body.user_id)


@router.patch("/users/{user_id}")
def change_user(
    user_id: str,
    body: UserChangeBody,
    caller: Admin,
    s: S,
    response: Response,
    expected: Expected,
    preview: Preview = False,
) -> dict[str, Any]:
    """Replace a user's roles, or enable or disable the user: one of the two at a time."""
    how = change(caller, body.reason, expected)
    store = s.coordinator.policy
    if (body.roles is None) == (body.status is None):
        raise BodyInvalid("give either roles or status")
    if body.roles is not None:
        return answer(response, store.set_roles(user_id, body.roles, **how), user_id=user_id)
    act = store.disable_user if body.status == "disabled" else store.enable_user
    return answer(response, act(user_id, dry_run=preview, **how), user_id=user_id)


@router.get("/users/{user_id}/permitted")
def permitted(user_id: str, _caller: Admin, s: S, response: Response) -> dict[str, Any]:
    """The silos the user may use now, each with the grant it rests on."""
    found = read(s, response, lambda connection: decision.permitted(connection, user_id, now()))
    return {
        "user_id": found.user_id,
        "silos": found.silos,
        "policy_version": found.policy_version,
        "reasons": found.reasons,
        "valid_until": found.valid_until,
    }


@router.get("/users/{user_id}/explain/{silo_id}")
def explained(user_id: str, silo_id: str, _caller: Auditor, s: S, response: Response) -> dict[str, Any]:
    """Why the user may or may not use the silo: the deciding path and the rules that lost."""
    found = read(s, response, lambda connection: explain(connection, user_id, silo_id, now()))
    losing = [{"grant_id": one.rule.grant_id, "path": one.path, "outcome": one.outcome} for one in found.losing]
    return {"allowed": found.allowed, "because": found.because, "path": found.path, "losing": losing}


@router.get("/groups")
def groups(_caller: Admin, s: S, response: Response) -> list[dict[str, Any]]:
    """All groups with their direct members."""
    return read(s, response, listing.groups)


@router.post("/groups", status_code=201)
def create_group(body: GroupBody, caller: Admin, s: S, response: Response, expected: Expected) -> dict[str, Any]:
    """Create an empty group."""
    how = change(caller, body.reason, expected)
    version = s.coordinator.policy.create_group(body.group_id, body.display_name, **how)
    return answer(response, version, group_id=body.group_id)


@router.post("/groups/{group_id}/members")
def add_member(
    group_id: str,
    body: MemberBody,
    caller: Admin,
    s: S,
    response: Response,
    expected: Expected,
    preview: Preview = False,
) -> dict[str, Any]:
    """Add user:ID or group:ID."""
    how = change(caller, body.reason, expected)
    done = s.coordinator.policy.add_member(group_id, body.member, dry_run=preview, **how)
    return answer(response, done, group_id=group_id)


@router.delete("/groups/{group_id}/members/{member}")
def remove_member(
    group_id: str,
    member: str,
    body: WithReason,
    caller: Admin,
    s: S,
    response: Response,
    expected: Expected,
    preview: Preview = False,
) -> dict[str, Any]:
    """Remove user:ID or group:ID."""
    how = change(caller, body.reason, expected)
    done = s.coordinator.policy.remove_member(group_id, member, dry_run=preview, **how)
    return answer(response, done, group_id=group_id)
