"""From messages or text to the tokens of a prompt, and from an answer's format to its grammar."""

from collections.abc import Mapping, Sequence
from typing import Any

from inference_gateway.api.chat_schema import ChatRequest, Conversation, JsonObjectFormat, JsonSchemaFormat, NamedTool
from inference_gateway.api.errors import InvalidValue, MessagesInvalid, UnsupportedParameter
from inference_gateway.errors import GrammarInvalid
from inference_gateway.service import Serving
from inference_gateway.tools import ANY_OBJECT, ToolFormat, format_of


def chat_prompt(
    serving: Serving, chat: Conversation, add_generation_prompt: bool = True, add_special_tokens: bool = False
) -> Sequence[int]:
    """The tokens of a conversation. Raises MessagesInvalid, InvalidValue or UnsupportedParameter."""
    if chat.speaks_of_tools:
        tool_format(serving, chat)
    turns = [message.turn() for message in chat.messages]
    tools = [tool.model_dump(exclude_none=True) for tool in chat.tools or ()] or None
    try:
        text = serving.tokenizer.apply_chat_template(
            turns, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # noqa: BLE001 - a template comes with a model and may raise anything
        raise _refusal(error) from None
    ids: list[int] = serving.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
    if not ids:
        raise MessagesInvalid("the messages are empty", "messages")
    return ids


def _refusal(error: Exception) -> MessagesInvalid:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return MessagesInvalid(f"the model's chat template refuses these messages: {reason[0]:.200}", "messages")


def text_prompt(serving: Serving, prompt: str | Sequence[int], add_special_tokens: bool = True) -> Sequence[int]:
    """The tokens of plain text, or the given tokens. Raises InvalidValue."""
    if not isinstance(prompt, str):
        check_tokens(serving, prompt, "prompt")
        return prompt
    ids: list[int] = serving.tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"]
    if not ids:
        raise InvalidValue("the prompt is empty", "prompt")
    return ids


def check_tokens(serving: Serving, ids: Sequence[int], param: str) -> None:
    """Raises InvalidValue naming the first id that is no token of the model."""
    wrong = next((token for token in ids if not 0 <= token < serving.vocabulary), None)
    if wrong is not None:
        raise InvalidValue(f"{wrong} is no token of the model, which has {serving.vocabulary}", param)


def tool_format(serving: Serving, chat: Conversation) -> ToolFormat:
    """How the model writes calls. Raises UnsupportedParameter where its template does not know tools, and
    MessagesInvalid where there is no template.
    """
    tokenizer: Any = serving.tokenizer
    try:
        template = tokenizer.get_chat_template(tools=[{}])
    except ValueError as error:
        raise _refusal(error) from None
    found = format_of(template)
    if found is None:
        raise UnsupportedParameter(
            "tools are not supported: the chat template of this model does not know them, or not in a way that "
            "this gateway can read",
            "tools" if chat.tools else "messages",
        )
    return found


def answer_grammar(serving: Serving, chat: ChatRequest) -> str | None:
    """The grammar that an answer is held to, if any. Raises InvalidValue naming what is wrong with a schema."""
    wanted = chat.response_format
    if isinstance(wanted, JsonObjectFormat):
        return serving.grammars.json_schema(ANY_OBJECT)
    if isinstance(wanted, JsonSchemaFormat):
        return _checked(serving, wanted.json_schema.schema_, "response_format.json_schema.schema")
    rules = _call_rules(serving, chat) if chat.may_call else None
    try:
        return None if rules is None else serving.grammars.lark(rules)
    except GrammarInvalid as error:
        raise InvalidValue(f"tools: {error}", "tools") from None


def _checked(serving: Serving, schema: Mapping[str, Any], where: str) -> str:
    """The grammar of a schema. Raises InvalidValue with the reason why there is none."""
    try:
        return serving.grammars.json_schema(schema)
    except GrammarInvalid as error:
        raise InvalidValue(f"{where}: {error}", where) from None


def _call_rules(serving: Serving, chat: ChatRequest) -> str | None:
    functions = [tool.function for tool in chat.tools or ()]
    choice = chat.tool_choice
    named = choice.function.name if isinstance(choice, NamedTool) else None
    free = named is None and choice != "required"
    if free and not any(one.strict for one in functions):
        return None
    schemas: dict[str, Mapping[str, Any]] = {}
    for index, one in enumerate(functions):
        if named in (None, one.name):
            schemas[one.name] = (one.parameters if one.strict or not free else None) or ANY_OBJECT
            _checked(serving, schemas[one.name], f"tools.{index}.function.parameters")
    known = tool_format(serving, chat)
    rules = known.free_grammar(schemas) if free else known.grammar(schemas)
    if rules is None:
        raise UnsupportedParameter(
            "strict functions are not supported with this model unless tool_choice is required", "tools"
        )
    return rules
