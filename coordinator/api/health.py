"""/healthz and /readyz: for supervisors; they say nothing but yes or no."""

from typing import Annotated

from fastapi import APIRouter, Depends

from coordinator.api.state import Services, services
from coordinator.db import require_schema

router = APIRouter(tags=["health"])


@router.get("/healthz")
def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/readyz")
def readyz(s: Annotated[Services, Depends(services)]) -> dict[str, str]:
    """Both databases answer and have the right schema."""
    require_schema(s.coordinator.engine)
    s.coordinator.require_policy()
    return {"status": "ready"}
