"""What bodies have in common: how an answer is drawn and ends. Everything unknown is refused by name, never ignored."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from inference_gateway.api.errors import UnknownParameter, UnsupportedParameter

# Parameters of OpenAI's and vLLM's interfaces that are not supported, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "audio": (),
    "bad_words": ([],),
    "cache_salt": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_json": (),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "metadata": ({},),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "prediction": (),
    "priority": (0,),
    "prompt_cache_key": (),
    "prompt_logprobs": (0,),
    "reasoning_effort": ("none",),
    "return_token_ids": (False,),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}
MAX_STOP = 4
MAX_CHOICES = 16
# More than any object here knows.
MAX_NAMES = 128
# On every list and dict: one wrong entry is enough to refuse it by, and an error for each of a million takes seconds.
SOON: Any = Field(fail_fast=True)

ModelName = Annotated[str, Field(min_length=1, max_length=512)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
StopString = Annotated[str, Field(min_length=1, max_length=1000)]


class Strict(BaseModel):
    """Refuses what it does not know and values of another type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _not_too_many_names(cls, document: Any) -> Any:
        if isinstance(document, dict) and len(document) > MAX_NAMES:
            raise UnknownParameter(f"an object in the body has {len(document)} members, more than this gateway knows")
        return document


class Body(Strict):
    """A request's body. ``unsupported``: names known from elsewhere that this route refuses with a sentence."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = UNSUPPORTED

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name, neutral in cls.unsupported.items():
            value = body.get(name)
            if value is not None and not any(_same(value, one) for one in neutral):
                raise UnsupportedParameter(f"{name} is not supported by this gateway; leave it out", name)
        return {name: value for name, value in body.items() if name not in cls.unsupported}


class StreamOptions(Strict):
    """How a stream ends."""

    include_usage: bool = False


class SeqrOptions(Strict):
    """This gateway's own options. ``silos`` narrows what the caller may use; it can never widen it."""

    attribution: bool = False
    silos: Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], SOON] | None = Field(
        default=None, max_length=1024
    )
    routing: Literal["prompt_evidence", "evidence", "per_token"] | None = None


class GenerationBody(Body):
    """What every route that generates takes. ``user`` is accepted: it names an end user and asks for nothing.

    Without a temperature the answer is greedy, so that it is the same each time.
    """

    model: ModelName
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], SOON] | None = Field(
        default=None, max_length=1024
    )
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: StopString | TokenId | Annotated[list[StopString | TokenId], SOON] | None = None
    stop_token_ids: Annotated[list[TokenId], SOON] | None = Field(default=None, max_length=64)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    seqr: SeqrOptions = Field(default_factory=SeqrOptions)

    @model_validator(mode="after")
    def _sound(self) -> "GenerationBody":
        if isinstance(self.stop, list) and len(self.stop) > MAX_STOP:
            raise UnsupportedParameter(f"stop has {len(self.stop)} entries, at most {MAX_STOP} are supported", "stop")
        if self.stream_options is not None and not self.stream:
            raise UnsupportedParameter("stream_options are for streams only; set stream to true", "stream_options")
        return self

    @property
    def choices(self) -> int:
        """How many answers to each prompt."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return tuple(one for one in self._stop_list if isinstance(one, str))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end the answer, from ``stop`` and ``stop_token_ids``."""
        return (*(one for one in self._stop_list if isinstance(one, int)), *(self.stop_token_ids or ()))

    @property
    def _stop_list(self) -> list[str | int]:
        return self.stop if isinstance(self.stop, list) else [] if self.stop is None else [self.stop]

    @property
    def token_limit(self) -> int | None:
        """How long the answer may get."""
        return self.max_tokens

    @property
    def top_alternatives(self) -> int | None:
        """How many alternatives to tell with each token's log-probability; None for no log-probabilities."""
        return None


def _same(value: Any, neutral: Any) -> bool:
    # True == 1 and 1.0 == 1 in Python; a request for n=true is still wrong.
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)
