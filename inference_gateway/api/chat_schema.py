"""The body of /v1/chat/completions: conversations, tools and what an answer must look like."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from inference_gateway.api.errors import InvalidValue, UnsupportedParameter
from inference_gateway.api.schema import SOON, UNSUPPORTED, Body, GenerationBody, Strict
from inference_gateway.tools import json_object

ROLES = {"developer": "system"}
CHAT_UNSUPPORTED = UNSUPPORTED | {
    "best_of": (1,),
    "echo": (False,),
    "parallel_tool_calls": (True,),
    "suffix": (),
}

Schema = dict[str, Any]
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class TextPart(Strict):
    """One part of a message that is a list of parts."""

    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    """What an earlier answer called; ``arguments`` is a JSON object as text."""

    name: FunctionName
    arguments: str


class ToolCallMade(Strict):
    """A call in an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Strict):
    """One turn of the conversation. Whether the model reads ``name`` is up to its chat template."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], SOON] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCallMade], SOON] | None = Field(default=None, max_length=128)
    tool_call_id: str | None = None
    # The official client sends these along with an answer that it hands back.
    refusal: None = None
    annotations: Annotated[list[Any], SOON] | None = Field(default=None, max_length=0)
    audio: None = None
    function_call: None = None

    def turn(self) -> dict[str, Any]:
        """The message as chat templates take it. Raises InvalidValue."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content or ())
        turn: dict[str, Any] = {"role": ROLES.get(self.role, self.role), "content": text}
        if self.tool_calls:
            turn["tool_calls"] = [
                {"id": call.id, "type": "function", "function": _for_template(call.function)}
                for call in self.tool_calls
            ]
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            turn["name"] = self.name
        return turn


def _for_template(function: CalledFunction) -> dict[str, Any]:
    arguments = json_object(function.arguments)
    if arguments is None:
        raise InvalidValue(f"the arguments of the call to {function.name} are not a JSON object in UTF-8", "messages")
    return {"name": function.name, "arguments": arguments}


class FunctionDefinition(Strict):
    """A function that the model may call; ``parameters`` is a JSON Schema."""

    name: FunctionName
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool that the model may use."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Strict):
    """A function by its name."""

    name: FunctionName


class NamedTool(Strict):
    """The one tool that the model has to use."""

    type: Literal["function"]
    function: NamedFunction


class TextFormat(Strict):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(Strict):
    """A schema and its name. It is kept to with and without ``strict``."""

    name: FunctionName
    schema_: Schema = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(Strict):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class Conversation(Body):
    """Messages and the tools they may speak of."""

    messages: list[Message] = Field(min_length=1, max_length=4096, fail_fast=True)
    tools: Annotated[list[Tool], SOON] | None = Field(default=None, max_length=128)

    @model_validator(mode="before")
    @classmethod
    def _refuse_in_messages(cls, body: Any) -> Any:
        messages = body.get("messages") if isinstance(body, dict) else None
        for index, message in enumerate(messages if isinstance(messages, list) else []):
            _refuse_in_message(index, message)
        return body

    @model_validator(mode="after")
    def _complete(self) -> "Conversation":
        for index, message in enumerate(self.messages):
            where = f"messages.{index}"
            if message.role == "tool" and message.tool_call_id is None:
                raise InvalidValue("a message of role tool needs the tool_call_id that it answers", where)
            if message.role != "tool" and message.tool_call_id is not None:
                raise InvalidValue("tool_call_id belongs to messages of role tool", where)
            if message.tool_calls and message.role != "assistant":
                raise InvalidValue("tool_calls belong to messages of role assistant", where)
            if message.content is None and not message.tool_calls:
                raise InvalidValue("this message has no content", f"{where}.content")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise InvalidValue("two tools have the same name", "tools")
        return self

    @property
    def speaks_of_tools(self) -> bool:
        """Whether the model's template has to know about tools."""
        return bool(self.tools) or any(one.role == "tool" or one.tool_calls for one in self.messages)


class ChatRequest(Conversation, GenerationBody):
    """The body of /v1/chat/completions."""

    unsupported = CHAT_UNSUPPORTED

    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise InvalidValue("top_logprobs needs logprobs to be true", "top_logprobs")
        choice = self.tool_choice
        if choice not in (None, "none", "auto") and not self.tools:
            raise InvalidValue("tool_choice names a tool, but there are no tools", "tool_choice")
        if isinstance(choice, NamedTool) and choice.function.name not in self.tool_names:
            raise InvalidValue(f"tool_choice names {choice.function.name}, which is none of the tools", "tool_choice")
        if self.may_call and not isinstance(self.response_format, TextFormat | None):
            raise UnsupportedParameter(
                "response_format is not supported together with tools; set tool_choice to none", "response_format"
            )
        return self

    @property
    def may_call(self) -> bool:
        """Whether the answer may be calls of tools."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def tool_names(self) -> list[str]:
        """The names of the functions."""
        return [tool.function.name for tool in self.tools or ()]

    @property
    def token_limit(self) -> int | None:
        """max_completion_tokens, or max_tokens, its older name; the smaller one when both are given."""
        given = [limit for limit in (self.max_completion_tokens, self.max_tokens) if limit is not None]
        return min(given, default=None)

    @property
    def top_alternatives(self) -> int | None:
        """See ``GenerationBody``."""
        return (self.top_logprobs or 0) if self.logprobs else None


def _refuse_in_message(index: int, message: Any) -> None:
    if not isinstance(message, dict):
        return
    where = f"messages.{index}"
    if message.get("role") == "function" or message.get("function_call"):
        raise UnsupportedParameter("functions are not supported by this gateway; use tools", where)
    content = message.get("content")
    for part in content if isinstance(content, list) else []:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise UnsupportedParameter(f"content of type {kind!r:.40} is not supported; send text", f"{where}.content")
