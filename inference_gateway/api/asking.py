"""From a body to engine requests: what may be used, what is asked, how long the answer may get."""

import hashlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from fastapi.concurrency import run_in_threadpool

from inference_gateway.api.errors import ContextLengthExceeded, InvalidValue, SiloUnavailable
from inference_gateway.api.models import SILO_PREFIX, not_found
from inference_gateway.api.prompting import check_tokens
from inference_gateway.api.schema import GenerationBody
from inference_gateway.engine.base import AdapterKey, GenerationRequest, Sampling
from inference_gateway.service import Service, Serving
from inference_gateway.settings import Settings
from policy.decision import Decision
from policy.keys import Principal


@dataclass(frozen=True)
class Wanted:
    """What a body asks for, in tokens. ``param`` names the field that the prompts come from."""

    prompts: Sequence[Sequence[int]]
    param: str
    grammar: str | None = None


@dataclass(frozen=True)
class Asked:
    """One admitted body. ``silos`` are those that may shape the answers, all permitted and resident.

    ``requests``: one for each choice; the choices of one prompt follow each other and share its tuple.
    """

    serving: Serving
    decision: Decision
    silos: tuple[str, ...]
    requests: tuple[GenerationRequest, ...]
    prompt_tokens: int
    model: str

    @property
    def request(self) -> GenerationRequest:
        """The first request; all have the same adapters and options."""
        return self.requests[0]

    @property
    def library_version(self) -> str:
        return self.serving.library_version(self.request.adapters)


async def prepare(
    service: Service, caller: Principal, body: GenerationBody, want: Callable[[Serving], Wanted]
) -> Asked:
    """Raises NotReady, RateLimited, ModelNotFound, SiloUnavailable, ContextLengthExceeded, InvalidValue, whatever
    ``want`` raises, or a PolicyError when the policy cannot be read.
    """
    serving, settings = service.serving, service.settings
    service.admission.check(caller, await run_in_threadpool(service.permissions.limits, caller), body.choices)
    decision = await run_in_threadpool(service.permissions.decide, caller.user_id)
    longest, resident = serving.engine.info().max_model_length, serving.resident()
    silos = _narrow(serving, decision, body, resident)
    usable = tuple(silo for silo in silos if silo in resident)
    wanted = await service.turns.run(caller.user_id, want, serving)
    _check_count(settings, len(wanted.prompts), body.choices, wanted.param)
    sampling = replace(_sampling(serving, body), grammar=wanted.grammar)
    requests: list[GenerationRequest] = []
    for tokens in wanted.prompts:
        _check_length(settings, len(tokens), wanted.param)
        one = GenerationRequest(
            request_id="",
            prompt=tuple(tokens),
            max_tokens=_room(longest, len(tokens), body.token_limit, settings.default_max_tokens, wanted.param),
            adapters=frozenset(resident[silo] for silo in usable),
            mode=body.seqr.routing or serving.plan.routing,
            attribution=body.seqr.attribution,
            frame=serving.frame.of(tokens),
            cache_salt=caller.user_id,
        )
        for _ in range(body.choices):
            seed = _derived(body.seed, len(requests))
            requests.append(replace(one, request_id=uuid.uuid4().hex, sampling=replace(sampling, seed=seed)))
    prompt_tokens = sum(len(tokens) for tokens in wanted.prompts)
    return Asked(serving, decision, usable, tuple(requests), prompt_tokens, body.model)


def _check_count(settings: Settings, prompts: int, choices: int, param: str) -> None:
    """Raises InvalidValue for more answers than can ever run and wait here together."""
    possible = settings.places_per_user + settings.max_waiting
    if prompts * choices > possible:
        raise InvalidValue(
            f"{prompts * choices} answers ({prompts} from {param}, n = {choices}) are more than the {possible} that "
            "this gateway can take from one request; lower n or send fewer prompts",
            "n" if choices > 1 else param,
        )


def _check_length(settings: Settings, tokens: int, param: str) -> None:
    allowed = settings.max_prompt_tokens
    if allowed is not None and tokens > allowed:
        raise ContextLengthExceeded(
            f"the prompt has {tokens} tokens, this gateway takes at most {allowed}; shorten it", param
        )


def _narrow(
    serving: Serving, decision: Decision, body: GenerationBody, resident: Mapping[str, AdapterKey]
) -> tuple[str, ...]:
    """The permitted silos that the request wants. What is not permitted is looked up nowhere: it is not there."""
    permitted = decision.silos
    named: list[tuple[str, str]] = []
    if body.model.startswith(SILO_PREFIX):
        named.append((body.model, body.model.removeprefix(SILO_PREFIX)))
    elif body.model != serving.plan.base_model:
        raise not_found(body.model)
    wanted = None if body.seqr.silos is None else set(body.seqr.silos)
    named += [(SILO_PREFIX + silo, silo) for silo in sorted(wanted or ())]
    for name, silo in named:
        if silo not in permitted:
            raise not_found(name)
        if silo not in resident:
            raise SiloUnavailable(f"the silo {silo!r} has no adapter at the moment; try again later", "seqr.silos")
    if body.model.startswith(SILO_PREFIX):
        only = {body.model.removeprefix(SILO_PREFIX)}
        wanted = only if wanted is None else only & wanted
    return tuple(silo for silo in permitted if wanted is None or silo in wanted)


def _sampling(serving: Serving, body: GenerationBody) -> Sampling:
    check_tokens(serving, body.stop_ids, "stop_token_ids" if body.stop_token_ids else "stop")
    return Sampling(
        temperature=body.temperature or 0.0,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),  # -1 is vLLM's way to say all
        min_p=body.min_p or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        logit_bias=_bias(serving, body),
        stop_ids=body.stop_ids,
        logprobs=body.top_alternatives,
    )


def _bias(serving: Serving, body: GenerationBody) -> tuple[tuple[int, float], ...]:
    biased = []
    for name, addend in (body.logit_bias or {}).items():
        if not (name.isascii() and name.isdigit() and len(name) < 10):
            raise InvalidValue(f"the keys of logit_bias are token ids, not {name!r:.40}", "logit_bias")
        biased.append((int(name), addend))
    check_tokens(serving, [token for token, _ in biased], "logit_bias")
    return tuple(sorted(biased))


def _derived(seed: int | None, choice: int) -> int | None:
    """The seed of a choice: that of the request for the first, so that it is the same with and without others."""
    if seed is None or choice == 0:
        return seed
    digest = hashlib.sha256(f"{seed}/{choice}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def _room(longest: int, prompt: int, wanted: int | None, default: int, param: str) -> int:
    """How many tokens the answer may have in a context of ``longest``. Raises ContextLengthExceeded."""
    if prompt >= longest:
        raise ContextLengthExceeded(
            f"the prompt has {prompt} tokens, the model's context holds {longest} with the answer; shorten it", param
        )
    if wanted is not None and prompt + wanted > longest:
        raise ContextLengthExceeded(
            f"the prompt has {prompt} tokens and the answer may have {wanted}, together more than the model's context "
            f"of {longest}; shorten one of them",
            "max_tokens",
        )
    return min(default, longest - prompt) if wanted is None else wanted
