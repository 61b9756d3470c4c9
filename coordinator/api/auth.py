"""Who is calling and what the key may do. Every route but those of ``OPEN`` depends on ``requires``."""

from collections.abc import Callable
from typing import Annotated

from fastapi import Depends, Request

from coordinator.api.state import Services, services
from coordinator.db import now
from coordinator.errors import NotYours, Unauthenticated
from policy.keys import Principal
from policy.listing import silos as policy_silos

# Asking to join, health, and a plan one already knows the id of: none of them changes anything that counts, and a plan
# holds public keys only.
OPEN = frozenset(
    {
        ("POST", "/v1/silos/enrolments"),
        ("GET", "/v1/plans/{plan_id}"),
        ("GET", "/healthz"),
        ("GET", "/readyz"),
    }
)
MANAGES_DELETIONS = frozenset({"admin", "privacy_officer"})


def requires(*scopes: str) -> Callable[[Request, Services], Principal]:
    """A dependency that gives the caller, whose key must carry one of ``scopes``.

    Raises Unauthenticated without a key; KeyUnknown, KeyExpired, KeyRevoked, UserDisabled, ScopeMissing.
    """

    def principal(request: Request, s: Annotated[Services, Depends(services)]) -> Principal:
        scheme, _, presented = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not presented.strip():
            raise Unauthenticated("this path needs an API key; send it as 'Authorization: Bearer seqr_...'")
        caller = s.coordinator.reader.authenticate(presented.strip(), now())
        if not caller.scopes & set(scopes):
            caller.require(scopes[0])
        request.state.user_id = caller.user_id
        return caller

    principal.scopes = scopes  # type: ignore[attr-defined]
    return principal


Admin = Annotated[Principal, Depends(requires("admin"))]
Officer = Annotated[Principal, Depends(requires("deletions"))]
Auditor = Annotated[Principal, Depends(requires("audit"))]
Gateway = Annotated[Principal, Depends(requires("gateway"))]
# Reading the state of the federation: admins, and officers who follow a deletion.
Reader = Annotated[Principal, Depends(requires("admin", "deletions"))]


def require_own_silo(s: Services, caller: Principal, silo_id: str) -> None:
    """A silo's owner may file for the own silo only. Raises NotYours, alike for foreign and unknown silos."""
    if silo_id not in own_silos(s, caller, silo_id):
        raise NotYours(f"you may file and see deletion requests of your own silos only, not of {silo_id!r:.80}")


def own_silos(s: Services, caller: Principal, *everything: str) -> frozenset[str]:
    """The silos whose requests the caller may see; ``everything`` for those who manage all deletions."""
    if caller.roles & MANAGES_DELETIONS:
        return frozenset(everything)
    with s.coordinator.policy_engine.connect() as connection:
        return frozenset(silo["silo_id"] for silo in policy_silos(connection) if caller.user_id in silo["owners"])
