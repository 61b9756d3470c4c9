"""From a chat request to an engine request: what may be used, what is asked, how long the answer may get."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi.concurrency import run_in_threadpool

from inference_gateway.api.errors import ContextLengthExceeded, MessagesInvalid, SiloUnavailable
from inference_gateway.api.models import SILO_PREFIX, not_found
from inference_gateway.api.schema import ChatRequest
from inference_gateway.engine.base import GenerationRequest, Sampling
from inference_gateway.service import Service, Serving
from policy.decision import Decision


@dataclass(frozen=True)
class Asked:
    """One admitted request. ``silos`` are those that may shape the answer, all permitted and resident."""

    serving: Serving
    decision: Decision
    silos: tuple[str, ...]
    request: GenerationRequest
    model: str

    @property
    def library_version(self) -> str:
        return self.serving.library_version(self.request.adapters)


async def prepare(service: Service, user_id: str, chat: ChatRequest) -> Asked:
    """Raises NotReady, ModelNotFound, SiloUnavailable, MessagesInvalid, ContextLengthExceeded, or a
    PolicyError when the policy cannot be read.
    """
    serving = service.serving
    decision = await run_in_threadpool(service.permissions.decide, user_id)
    silos = _narrow(serving, decision, chat)
    resident = serving.resident()
    usable = tuple(silo for silo in silos if silo in resident)
    prompt = await run_in_threadpool(_prompt, serving.tokenizer, chat)
    sampling = Sampling(chat.temperature or 0.0, 1.0 if chat.top_p is None else chat.top_p, seed=chat.seed)
    request = GenerationRequest(
        request_id=uuid.uuid4().hex,
        prompt=tuple(prompt),
        max_tokens=_room(serving, len(prompt), chat.token_limit, service.settings.default_max_tokens),
        adapters=frozenset(resident[silo] for silo in usable),
        mode=chat.seqr.routing or serving.plan.routing,
        sampling=sampling,
        attribution=chat.seqr.attribution,
        frame=serving.frame.of(prompt),
    )
    return Asked(serving, decision, usable, request, chat.model)


def _narrow(serving: Serving, decision: Decision, chat: ChatRequest) -> tuple[str, ...]:
    """The permitted silos that the request wants. What is not permitted is looked up nowhere: it is not there."""
    permitted = decision.silos
    named: list[tuple[str, str]] = []
    if chat.model.startswith(SILO_PREFIX):
        named.append((chat.model, chat.model.removeprefix(SILO_PREFIX)))
    elif chat.model != serving.plan.base_model:
        raise not_found(chat.model)
    wanted = None if chat.seqr.silos is None else set(chat.seqr.silos)
    named += [(SILO_PREFIX + silo, silo) for silo in sorted(wanted or ())]
    resident = serving.resident()
    for name, silo in named:
        if silo not in permitted:
            raise not_found(name)
        if silo not in resident:
            raise SiloUnavailable(f"the silo {silo!r} has no adapter at the moment; try again later", "seqr.silos")
    if chat.model.startswith(SILO_PREFIX):
        only = {chat.model.removeprefix(SILO_PREFIX)}
        wanted = only if wanted is None else only & wanted
    return tuple(silo for silo in permitted if wanted is None or silo in wanted)


def _prompt(tokenizer: Any, chat: ChatRequest) -> Sequence[int]:
    turns = [message.turn() for message in chat.messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # noqa: BLE001 - a template comes with a model and may raise anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise MessagesInvalid(
            f"the model's chat template refuses these messages: {reason[0]:.200}", "messages"
        ) from None
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise MessagesInvalid("the messages are empty", "messages")
    return ids


def _room(serving: Serving, prompt: int, wanted: int | None, default: int) -> int:
    """How many tokens the answer may have. Raises ContextLengthExceeded."""
    longest = serving.engine.info().max_model_length
    if prompt >= longest:
        raise ContextLengthExceeded(
            f"the prompt has {prompt} tokens, the model's context holds {longest} with the answer; shorten it",
            "messages",
        )
    if wanted is not None and prompt + wanted > longest:
        raise ContextLengthExceeded(
            f"the prompt has {prompt} tokens and the answer may have {wanted}, together more than the model's context "
            f"of {longest}; shorten one of them",
            "max_tokens",
        )
    return min(default, longest - prompt) if wanted is None else wanted
