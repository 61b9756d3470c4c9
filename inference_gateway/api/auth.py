"""Who is asking. Every route under /v1 depends on this."""

from typing import Annotated

from fastapi import Depends, Header, Request
from fastapi.concurrency import run_in_threadpool

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
    """The key's owner. Raises KeyMissing, or what ``Permissions.authenticate`` raises."""
    scheme, _, presented = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not presented.strip():
        raise KeyMissing("this request has no API key; send the header Authorization: Bearer KEY")
    return await run_in_threadpool(service.permissions.authenticate, presented.strip())


ServiceDep = Annotated[Service, Depends(service_of)]
Caller = Annotated[Principal, Depends(authenticated)]
