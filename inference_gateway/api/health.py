"""/healthz: the process answers. /readyz: it can serve. Neither says anything about silos or users."""

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from inference_gateway.api.auth import ServiceDep

router = APIRouter()


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """200 as long as the process runs."""
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(service: ServiceDep) -> JSONResponse:
    """200 once model, engine and library are there and the engine's worker lives; 503 with the reason otherwise."""
    problem = service.problem()
    if problem is None:
        return JSONResponse({"status": "ready"})
    return JSONResponse({"status": "not ready", "reason": problem}, 503, headers={"Retry-After": "1"})
