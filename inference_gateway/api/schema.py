"""What a chat request may hold. Everything else is refused by name, never ignored."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from inference_gateway.api.errors import UnsupportedParameter

# Parameters of OpenAI's interface that are not supported, with the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "metadata": ({},),
    "web_search_options": (),
    "prompt_cache_key": (),
    "safety_identifier": (),
    "top_k": (),
    "min_p": (),
    "repetition_penalty": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": (),
}
MAX_STOP = 4
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TextPart(_Strict):
    """One part of a message that is a list of parts."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def turn(self) -> dict[str, str]:
        """The message as chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": ROLES[self.role], "content": text}


class StreamOptions(_Strict):
    """How a stream ends."""

    include_usage: bool = False


class SeqrOptions(_Strict):
    """This gateway's own options. ``silos`` narrows what the caller may use; it can never widen it."""

    attribution: bool = False
    silos: list[Annotated[str, Field(min_length=1, max_length=200)]] | None = Field(default=None, max_length=1024)
    routing: Literal["prompt_evidence", "evidence", "per_token"] | None = None


class ChatRequest(_Strict):
    """The body of /v1/chat/completions. ``user`` is accepted: it names an end user and asks for nothing."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[str, Field(min_length=1)] | list[Annotated[str, Field(min_length=1)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    seqr: SeqrOptions = Field(default_factory=SeqrOptions)

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name, neutral in UNSUPPORTED.items():
            value = body.get(name)
            if value is not None and not any(_same(value, one) for one in neutral):
                raise UnsupportedParameter(f"{name} is not supported by this gateway; leave it out", name)
        for index, message in enumerate(body["messages"] if isinstance(body.get("messages"), list) else []):
            _refuse_in_message(index, message)
        stop = body.get("stop")
        if isinstance(stop, list) and len(stop) > MAX_STOP:
            raise UnsupportedParameter(f"stop has {len(stop)} strings, at most {MAX_STOP} are supported", "stop")
        return {name: value for name, value in body.items() if name not in UNSUPPORTED}

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def token_limit(self) -> int | None:
        """max_completion_tokens, or max_tokens, its older name; the smaller one when both are given."""
        given = [limit for limit in (self.max_completion_tokens, self.max_tokens) if limit is not None]
        return min(given, default=None)


def _same(value: Any, neutral: Any) -> bool:
    # True == 1 and 1.0 == 1 in Python; a request for n=true is still wrong.
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def _refuse_in_message(index: int, message: Any) -> None:
    if not isinstance(message, dict):
        return
    where = f"messages.{index}"
    if message.get("role") in ("tool", "function") or message.get("tool_calls") or message.get("function_call"):
        raise UnsupportedParameter("tool calls are not supported by this gateway; leave them out", where)
    content = message.get("content")
    for part in content if isinstance(content, list) else []:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise UnsupportedParameter(f"content of type {kind!r:.40} is not supported; send text", f"{where}.content")
