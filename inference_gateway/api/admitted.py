"""The one step that every generating route takes between reading a request and asking the engine."""

from collections.abc import Sequence

from fastapi.concurrency import run_in_threadpool

from inference_gateway.admission import Grant
from inference_gateway.api.errors import ContextLengthExceeded
from inference_gateway.engine.base import GenerationRequest
from inference_gateway.service import Service
from policy.keys import Principal


async def admitted(
    service: Service,
    caller: Principal,
    requests: Sequence[GenerationRequest],
    prompt_tokens: int,
    param: str | None = None,
) -> Grant:
    """Leave for all answers to one body; ``prompt_tokens`` counts each prompt once. The caller closes the grant.

    Raises ContextLengthExceeded, RateLimited, or a PolicyError.
    """
    allowed = service.settings.max_prompt_tokens
    longest = max(len(request.prompt) for request in requests)
    if allowed is not None and longest > allowed:
        raise ContextLengthExceeded(
            f"the prompt has {longest} tokens, this gateway takes at most {allowed}; shorten it", param
        )
    limits = await run_in_threadpool(service.permissions.limits, caller)
    return service.admission.admit(
        caller,
        limits,
        prompt_tokens=prompt_tokens,
        max_tokens=sum(request.max_tokens for request in requests),
        model=service.serving.plan.base_model,
    )
