"""/v1/models: the base model, and the silos that the caller may use, which is all that exists for the caller."""

from datetime import datetime
from typing import Any

from fastapi import APIRouter, Response
from fastapi.concurrency import run_in_threadpool

from inference_gateway.api.auth import Caller, ServiceDep
from inference_gateway.api.errors import ModelNotFound
from inference_gateway.engine.base import AdapterKey
from inference_gateway.service import Service, Serving
from policy.decision import Decision
from policy.keys import Principal

SILO_PREFIX = "silo:"

router = APIRouter()


def not_found(name: str) -> ModelNotFound:
    """The one answer to what does not exist and to what is not permitted."""
    return ModelNotFound(f"the model {name!r:.200} does not exist or is not available to you", "model")


@router.get("/models")
async def list_models(service: ServiceDep, caller: Caller, response: Response) -> dict[str, Any]:
    """The caller's own view."""
    serving = service.serving
    decision = await run_in_threadpool(service.permissions.decide, caller.user_id)
    response.headers.update(_headers(serving, decision))
    return {"object": "list", "data": _entries(serving, decision)}


@router.get("/models/{name:path}")
async def get_model(name: str, service: ServiceDep, caller: Caller, response: Response) -> dict[str, Any]:
    """One entry of the caller's own view. Raises ModelNotFound."""
    serving = service.serving
    decision = await run_in_threadpool(service.permissions.decide, caller.user_id)
    for entry in _entries(serving, decision):
        if entry["id"] == name:
            response.headers.update(_headers(serving, decision))
            return entry
    raise not_found(name)


async def check_model(service: Service, caller: Principal, name: str | None) -> None:
    """Raises ModelNotFound for a name that is not in the caller's own view."""
    if name is None or name == service.serving.plan.base_model:
        return
    decision = await run_in_threadpool(service.permissions.decide, caller.user_id)
    if name not in [entry["id"] for entry in _entries(service.serving, decision)]:
        raise not_found(name)


def headers_of(serving: Serving, decision: Decision, usable: frozenset[AdapterKey]) -> dict[str, str]:
    """The headers of every answer to ``decision`` with the adapters in ``usable``, beside those of ``observing``."""
    return {
        "X-Seqr-Policy-Version": str(decision.policy_version),
        "X-Seqr-Library-Version": serving.library_version(usable),
    }


def _headers(serving: Serving, decision: Decision) -> dict[str, str]:
    resident = serving.resident()
    usable = frozenset(resident[silo] for silo in decision.silos if silo in resident)
    return headers_of(serving, decision, usable)


def _entries(serving: Serving, decision: Decision) -> list[dict[str, Any]]:
    resident = serving.resident()
    silos = [SILO_PREFIX + silo for silo in decision.silos if silo in resident]
    created = int(datetime.fromisoformat(serving.plan.created_at).timestamp())
    return [
        {"id": name, "object": "model", "created": created, "owned_by": "seqr"}
        for name in [serving.plan.base_model, *silos]
    ]
