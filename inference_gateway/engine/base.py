"""The interface between the gateway and whatever generates tokens. Engines know no users and no policy.

An adapter in an engine is immutable and called by its key; a request names the keys it may use, once, when it starts.
"""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from seqr.frame import NO_FRAME, Frame

if TYPE_CHECKING:  # neither the policy's side nor the routes need torch to name an engine
    from seqr.adapter import Adapter
    from seqr.library import Statistics


@dataclass(frozen=True, order=True)
class AdapterKey:
    """One revision of one silo; written ``silo@digest`` in logs."""

    silo_id: str
    revision: int
    digest: str

    def __str__(self) -> str:
        return f"{self.silo_id}@{self.digest[:16]}"


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: temperature 0 is greedy; a seed makes a request's own draws repeatable.

    ``top_k`` 0 and ``min_p`` 0 leave all tokens. ``logit_bias``: token id to an addend on its logit. ``stop_ids``:
    tokens that end the answer beside the model's own. ``logprobs``: None for none, else how many alternatives to tell
    with each token's. ``grammar``: what the answer's text must match, in the notation of ``inference_gateway.grammar``.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    grammar: str | None = None


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt in tokens, how to go on, and the adapters that may shape it. An empty set means the base model alone.

    ``mode``: see ``seqr.step.Segment``; ``frame``: what of the prompt is the same in every conversation.
    ``cache_salt``: where prefixes are shared, they are shared among requests of equal salt only.
    """

    request_id: str
    prompt: tuple[int, ...]
    max_tokens: int
    adapters: frozenset[AdapterKey]
    mode: str
    sampling: Sampling = field(default_factory=Sampling)
    attribution: bool = False
    frame: Frame = NO_FRAME
    cache_salt: str = ""


@dataclass(frozen=True)
class TokenLogprobs:
    """ln p of a chosen token, and of the likeliest ones as (id, ln p), largest first; before any sampling option."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class TokenShares:
    """In how many of ``choices`` adapted modules each silo shaped the pass that produced a token.

    ``margin``: how far the winner's score lay above the next permitted one's, mean over the modules where two or more
    were permitted; None where there was nothing to choose between. Always a difference of calibrated scores (standard
    deviations of public text): per_token of this token's scores, evidence of the sums of means that the choice was made
    by, prompt_evidence of the mean scores of all of the prompt's words, the same for every token of an answer.
    """

    counts: Mapping[str, int]
    choices: int
    margin: float | None


@dataclass(frozen=True)
class Tokens:
    """New tokens of a request, in order. ``logprobs`` and ``shares``: one for each id, or empty when not asked for.

    ``totals``: the request's shares up to these tokens; None when not asked for.
    """

    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    shares: tuple[TokenShares, ...] = ()
    totals: "Shares | None" = None


@dataclass(frozen=True)
class Shares:
    """How many (token, module) choices each silo won; ``answer`` counts the passes that produced an answer token."""

    total: Mapping[str, int]
    answer: Mapping[str, int]
    choices: int
    answer_choices: int


@dataclass(frozen=True)
class Finished:
    """The end of a request: ``stop`` (end-of-sequence token) or ``length``."""

    reason: str
    shares: Shares | None = None


@dataclass(frozen=True)
class Failed:
    """The end of a request by an error; nothing follows it."""

    code: str
    message: str


Event = Tokens | Finished | Failed


@dataclass
class Counters:
    """What an engine has done since its start.

    ``step_seconds``: spent in ``steps`` forward passes with the drawing of tokens. ``prefix_queries`` and
    ``prefix_hits``: prompt tokens looked up and found. ``preemptions``: requests that a full cache made start again.
    """

    steps: int = 0
    step_seconds: float = 0.0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0


@dataclass(kw_only=True)
class EngineInfo(Counters):
    """What an engine can hold, holds now and has done.

    ``kv_blocks_used``: blocks that running requests hold, without those kept for their prefix alone.
    """

    max_model_length: int
    max_concurrent: int
    running: int
    waiting: int
    adapters: tuple[AdapterKey, ...]
    library_version: int
    alive: bool
    kv_blocks: int = 0
    kv_blocks_used: int = 0
    permission_rows: int = 1


class StepGuard(Protocol):
    """Asked by the engine before every step and again before tokens leave it, on the engine's own thread."""

    def withdrawn(self) -> Mapping[str, Failed]:
        """The running requests that must not have another token, and why. Must not raise; must be quick."""


class Engine(Protocol):
    """Generates tokens under permission sets."""

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def load(self, key: AdapterKey, adapter: "Adapter", statistics: "Statistics | None") -> int:
        """Make an adapter usable, atomically between two steps; returns the library version.

        Another revision of the same silo leaves in the same instant, and requests that may have used it fail.
        """
        ...

    async def retire(self, key: AdapterKey) -> None:
        """Let no new request use the adapter, and remove it when the last request that may use it is over."""
        ...

    async def revoke(self, key: AdapterKey) -> int:
        """Remove the adapter now; requests that may have used it fail. Returns the library version."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        """The events of one request, ending with ``Finished`` or ``Failed``. Closing the generator aborts it."""
        ...

    async def abort(self, request_id: str) -> None:
        """End a request; unknown ids are ignored."""
        ...

    def info(self) -> EngineInfo: ...
