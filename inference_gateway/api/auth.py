"""Who is asking. Every route under /v1 depends on this."""

from typing import Annotated

from fastapi import Depends, Header, Request
from fastapi.concurrency import run_in_threadpool

from inference_gateway import request_record
from inference_gateway.api.errors import KeyMissing
from inference_gateway.service import Service
from policy.keys import Principal


def service_of(request: Request) -> Service:
    """The gateway this application serves."""
    service = request.app.state.service
    if not isinstance(service, Service):
        raise TypeError("the application was made without a Service")
    return service


async def authenticated(
    service: Annotated[Service, Depends(service_of)], authorization: Annotated[str | None, Header()] = None
) -> Principal:
    """The owner of a key that may chat. Raises KeyMissing, or what ``Permissions.authenticate`` raises."""
    return await _owner(service, authorization, "chat")


async def operator(
    service: Annotated[Service, Depends(service_of)], authorization: Annotated[str | None, Header()] = None
) -> Principal:
    """The owner of a key that may read metrics; else as ``authenticated``."""
    return await _owner(service, authorization, "metrics")


async def _owner(service: Service, authorization: str | None, scope: str) -> Principal:
    scheme, _, presented = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not presented.strip():
        raise KeyMissing("this request has no API key; send the header Authorization: Bearer KEY")
    principal = await run_in_threadpool(service.permissions.authenticate, presented.strip(), scope)
    request_record.current().fields |= {"user": principal.user_id, "key": principal.key_id}
    return principal


ServiceDep = Annotated[Service, Depends(service_of)]
Caller = Annotated[Principal, Depends(authenticated)]
Operator = Annotated[Principal, Depends(operator)]
