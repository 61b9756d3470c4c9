"""The bodies of /v1/completions, /tokenize and /detokenize."""

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from inference_gateway.api.chat_schema import Conversation
from inference_gateway.api.schema import UNSUPPORTED, Body, GenerationBody, ModelName, TokenId

MAX_PROMPTS = 64

Tokens = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
TokenLists = Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]


def _kind(prompt: Any) -> str | None:
    if not isinstance(prompt, list):
        return "text" if isinstance(prompt, str) else None
    first = prompt[0] if prompt else None
    return "texts" if isinstance(first, str) else "token_lists" if isinstance(first, list) else "tokens"


Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[Texts, Tag("texts")]
    | Annotated[Tokens, Tag("tokens")]
    | Annotated[TokenLists, Tag("token_lists")],
    Discriminator(
        _kind,
        custom_error_type="prompt_kind",
        custom_error_message="Input should be a text, a list of texts, a list of tokens or a list of such lists",
    ),
]


class CompletionRequest(GenerationBody):
    """The body of /v1/completions. ``logprobs``: with how many alternatives to tell each token's log-probability."""

    unsupported = UNSUPPORTED | {
        "best_of": (1,),
        "echo": (False,),
        "suffix": (),
        "response_format": ({"type": "text"},),
        "tools": ([],),
        "tool_choice": ("none",),
        "top_logprobs": (0,),
        "max_completion_tokens": (),
        "messages": (),
    }

    prompt: Prompt
    logprobs: int | None = Field(default=None, ge=0, le=20)

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt

    @property
    def top_alternatives(self) -> int | None:
        """See ``GenerationBody``."""
        return self.logprobs


_TOKENIZE_UNSUPPORTED = {
    name: UNSUPPORTED[name] for name in ("chat_template", "chat_template_kwargs", "continue_final_message")
}


class TokenizePrompt(Body):
    """The body of /tokenize for plain text, as vLLM has it."""

    unsupported = _TOKENIZE_UNSUPPORTED

    model: ModelName | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeMessages(Conversation):
    """The body of /tokenize for a conversation, which the model's chat template puts into text."""

    unsupported = _TOKENIZE_UNSUPPORTED

    model: ModelName | None = None
    add_special_tokens: bool = False
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Body):
    """The body of /detokenize."""

    unsupported = {}

    model: ModelName | None = None
    tokens: list[TokenId] = Field(max_length=2**20, fail_fast=True)
