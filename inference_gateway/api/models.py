"""/v1/models: the base model, and the silos that the caller may use, which is all that exists for the caller."""

from datetime import datetime
from typing import Any

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool

from inference_gateway.api.auth import Caller, ServiceDep
from inference_gateway.api.errors import ModelNotFound
from inference_gateway.service import Serving
from policy.decision import Decision

SILO_PREFIX = "silo:"

router = APIRouter()


def not_found(name: str) -> ModelNotFound:
    """The one answer to what does not exist and to what is not permitted."""
    return ModelNotFound(f"the model {name!r:.200} does not exist or is not available to you", "model")


@router.get("/models")
async def list_models(service: ServiceDep, caller: Caller) -> dict[str, Any]:
    """The caller's own view."""
    serving = service.serving
    decision = await run_in_threadpool(service.permissions.decide, caller.user_id)
    return {"object": "list", "data": _entries(serving, decision)}


@router.get("/models/{name:path}")
async def get_model(name: str, service: ServiceDep, caller: Caller) -> dict[str, Any]:
    """One entry of the caller's own view. Raises ModelNotFound."""
    serving = service.serving
    decision = await run_in_threadpool(service.permissions.decide, caller.user_id)
    for entry in _entries(serving, decision):
        if entry["id"] == name:
            return entry
    raise not_found(name)


def _entries(serving: Serving, decision: Decision) -> list[dict[str, Any]]:
    resident = serving.resident()
    silos = [SILO_PREFIX + silo for silo in decision.silos if silo in resident]
    created = int(datetime.fromisoformat(serving.plan.created_at).timestamp())
    return [
        {"id": name, "object": "model", "created": created, "owned_by": "seqr"}
        for name in [serving.plan.base_model, *silos]
    ]
