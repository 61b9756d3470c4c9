"""/v1/revisions: every adapter that was handed in, and where it stands."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends

from coordinator import revisions
from coordinator.api.auth import Reader
from coordinator.api.state import Services, services
from coordinator.db import reading

router = APIRouter(prefix="/v1/revisions", tags=["revisions"])

_SHOWN = (
    *("revision_id", "silo_id", "plan_id", "revision", "state", "sealed_sha256", "sealed_bytes", "adapter_digest"),
    *("code", "message", "created_at", "changed_at"),
)


@router.get("")
def listing(
    _caller: Reader, s: Annotated[Services, Depends(services)], silo_id: str | None = None
) -> list[dict[str, Any]]:
    """The latest revisions, newest first."""
    with reading(s.coordinator.engine) as connection:
        found = revisions.listing(connection, silo_id)
    return [{name: row[name] for name in _SHOWN} for row in found]
