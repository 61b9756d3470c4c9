"""The one step that every generating route takes between reading a request and asking the engine."""

from collections.abc import Sequence

from fastapi.concurrency import run_in_threadpool

from inference_gateway.admission import Ticket
from inference_gateway.engine.base import GenerationRequest
from inference_gateway.service import Service
from policy.keys import Principal


async def admitted(
    service: Service, caller: Principal, requests: Sequence[GenerationRequest], prompt_tokens: int
) -> Ticket:
    """Leave for all answers to one body; ``prompt_tokens`` counts each prompt once. The caller closes the ticket.

    Raises RateLimited, or a PolicyError.
    """
    limits = await run_in_threadpool(service.permissions.limits, caller)
    return service.admission.admit(
        caller,
        limits,
        prompt_tokens=prompt_tokens,
        max_tokens=sum(request.max_tokens for request in requests),
        answers=len(requests),
        model=service.serving.plan.base_model,
    )
