"""Tools: what a template knows, how calls are read, and how an answer is held to one."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from inference_gateway.tools import BareCalls, TaggedCalls, ToolCall, format_of
from tests.inference_gateway.conftest import Running, World
from tests.inference_gateway.scripted import says, scripted
from tests.inference_gateway.test_chat_api import MODEL, QUESTION

TAGGED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BARE = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{% if tools %}"
    'Answer as {"name": ..., "parameters": ...}.{% for t in tools %}{{ t.function.name }}{% endfor %}{% endif %}\n'
)
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"enum": ["Oslo", "Rome"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["place", "days"],
            "additionalProperties": False,
        },
    },
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": NOTHING}}
WRONG = {"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}


@pytest.fixture(scope="module")
def own(make_world: Callable[[Path], World], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A gateway whose chat template these tests may change."""
    server = Running(make_world(tmp_path_factory.mktemp("tools") / "gateway")).start()
    try:
        server.await_adapters()
        yield server
    finally:
        server.stop()


@pytest.fixture
def tagged(own: Running) -> Running:
    own.service.serving.tokenizer.chat_template = TAGGED
    return own


@pytest.fixture
def bare(own: Running) -> Running:
    own.service.serving.tokenizer.chat_template = BARE
    return own


def ask(running: Running, **options: Any) -> Any:
    asked = {"model": MODEL, "messages": QUESTION, "tools": [WEATHER, CLOCK], "max_tokens": 120, **options}
    return running.openai("alice").chat.completions.create(**asked)


def pushed(reader: Any, text: str, seed: int) -> tuple[str, list[ToolCall]]:
    draw, out = random.Random(seed), ""
    while text:
        take = draw.randint(1, 7)
        out += reader.push(text[:take])
        text = text[take:]
    return out + reader.finish(), reader.calls


CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("text", "shown", "calls"),
    [
        ("just text with < and <tool", "just text with < and <tool", 0),
        (CALL, "", 1),
        (f"I look. {CALL}\n{CALL}", "I look. ", 2),
        (f"{CALL} done", "done", 1),
        (CALL.removesuffix("</tool_call>"), "", 1),
        ("<tool_call>not json</tool_call>", "<tool_call>not json</tool_call>", 0),
        ('<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', 0),
        ("<tool_call>{", "<tool_call>{", 0),
        (f'<tool_call>{{"name": "f</tool_call> {CALL}', '<tool_call>{"name": "f</tool_call> ', 1),
        ('<tool_call>{"name": "f</tool_call> so', '<tool_call>{"name": "f</tool_call> so', 0),
    ],
)
def test_tagged_calls_are_read_however_the_text_is_cut(text: str, shown: str, calls: int, seed: int) -> None:
    out, found = pushed(TaggedCalls().reader(["f"]), text, seed)
    assert (out, found) == (shown, [ToolCall("f", '{"a": 1}')] * calls)


@pytest.mark.parametrize("seed", range(4))
def test_an_end_tag_in_a_string_of_a_call_is_a_part_of_it(seed: int) -> None:
    arguments = '{"a": "x </tool_call> \\"y</tool_call>", "b": "</tool_call>"}'
    call = f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>'
    out, found = pushed(TaggedCalls().reader(["f"]), f"{call}{CALL}{call} done", seed)
    assert out == "done"
    assert found == [ToolCall("f", arguments), ToolCall("f", '{"a": 1}'), ToolCall("f", arguments)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("text", "shown", "calls"),
    [
        ("text with {braces}", "text with {braces}", 0),
        ('{"name": "f", "parameters": {"a": 1}}', "", 1),
        ('\n{"name": "f", "parameters": {"a": 1}}; {"name": "f", "parameters": {"a": 1}}', "", 2),
        ('{"name": "f", "parameters": [1]}', '{"name": "f", "parameters": [1]}', 0),
        ('{"some": "json"}', '{"some": "json"}', 0),
        ('{"name": "f", "parameters": {"a": 1}} and text', '{"name": "f", "parameters": {"a": 1}} and text', 0),
        ("{", "{", 0),
        ("", "", 0),
    ],
)
def test_bare_calls_are_read_however_the_text_is_cut(text: str, shown: str, calls: int, seed: int) -> None:
    out, found = pushed(BareCalls().reader(["f"]), text, seed)
    assert (out, found) == (shown, [ToolCall("f", '{"a": 1}')] * calls)


def test_the_template_tells_how_a_model_calls() -> None:
    assert isinstance(format_of(TAGGED), TaggedCalls) and isinstance(format_of(BARE), BareCalls)
    assert format_of("{{ messages }}") is None
    assert format_of("{{ tools }} in some other way") is None
    assert format_of("{{ tools }} <tool_call><function=f>") is None


def test_the_name_in_a_message_reaches_templates_that_read_it(own: Running) -> None:
    own.service.serving.tokenizer.chat_template = "{% for m in messages %}{{ m.name }}: {{ m.content }}{% endfor %}"
    messages = [{"role": "user", "name": "ann", "content": "hi"}]
    tokens = own.http("alice").post("/tokenize", json={"messages": messages}).json()["tokens"]
    text = own.http("alice").post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert text == "ann: hi"


def test_tools_are_refused_by_name_where_the_template_does_not_know_them(own: Running) -> None:
    own.service.serving.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    called = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for options, param in (
        ({}, "tools"),
        ({"tools": None, "messages": [{"role": "assistant", "tool_calls": [called]}]}, "messages"),
    ):
        with pytest.raises(openai.BadRequestError, match="chat template of this model does not know them") as refused:
            ask(own, **options)
        assert (refused.value.code, refused.value.param) == ("unsupported_parameter", param)


def test_a_call_becomes_tool_calls_plain_and_streamed(tagged: Running) -> None:
    text = 'I look. <tool_call>\n{"name": "weather", "arguments": {"place": "Oslo", "days": 2}}\n</tool_call>'
    with scripted(tagged, says(tagged, text)):
        answer = ask(tagged)
        chunks = list(ask(tagged, stream=True))
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "I look."
    (call,) = choice.message.tool_calls
    assert call.function.name == "weather" and json.loads(call.function.arguments) == {"place": "Oslo", "days": 2}
    assert call.id.startswith("call_") and call.type == "function"
    deltas = [c.choices[0] for c in chunks]
    assert "".join(d.delta.content or "" for d in deltas) == "I look. "
    (streamed,) = [one for d in deltas for one in d.delta.tool_calls or []]
    assert streamed.index == 0 and streamed.function.name == "weather"
    assert streamed.function.arguments == call.function.arguments
    assert deltas[-1].finish_reason == "tool_calls"


def test_bare_calls_become_tool_calls(bare: Running) -> None:
    with scripted(bare, says(bare, '{"name": "clock", "parameters": {}}')):
        choice = ask(bare).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert [one.function.name for one in choice.message.tool_calls] == ["clock"]


def test_an_answer_without_calls_stays_text(tagged: Running) -> None:
    with scripted(tagged, says(tagged, "No need to <tool")):
        choice = ask(tagged).choices[0]
        off = ask(tagged, tool_choice="none").choices[0]
    assert choice.message.content == off.message.content == "No need to <tool"
    assert choice.message.tool_calls is None and choice.finish_reason == "stop"


NO_CALLS = {
    "a name that is none of the tools": '{"name": "nothing", ARGUMENTS: {}}',
    "a name that no function may have": '{"name": "a b/c", ARGUMENTS: {}}',
    "a name that is no text": '{"name": "\\ud800", ARGUMENTS: {}}',
    "half a character": '{"name": "clock", ARGUMENTS: {"a": "\\ud800"}}',
    "half a character in a key": '{"name": "clock", ARGUMENTS: {"\\udfff": 1}}',
    "NaN": '{"name": "clock", ARGUMENTS: {"a": NaN}}',
    "an infinity": '{"name": "clock", ARGUMENTS: {"a": -Infinity}}',
    "a number beyond a double": '{"name": "clock", ARGUMENTS: {"a": 1e999}}',
}


@pytest.mark.parametrize("what", NO_CALLS)
@pytest.mark.parametrize("template", [TAGGED, BARE], ids=["tagged", "bare"])
def test_what_is_no_call_of_a_tool_in_json_stays_text_plain_and_streamed(
    own: Running, template: str, what: str
) -> None:
    own.service.serving.tokenizer.chat_template = template
    name, (begin, end) = (
        ('"arguments"', ("<tool_call>", "</tool_call>")) if template == TAGGED else ('"parameters"', "  ")
    )
    text = begin + NO_CALLS[what].replace("ARGUMENTS", name) + end
    with scripted(own, says(own, text)):
        choice = ask(own).choices[0]
        chunks = [chunk.choices[0] for chunk in ask(own, stream=True)]
    assert choice.message.content == text and choice.message.tool_calls is None and choice.finish_reason == "stop"
    assert "".join(chunk.delta.content or "" for chunk in chunks) == text and chunks[-1].finish_reason == "stop"
    assert not any(chunk.delta.tool_calls for chunk in chunks)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("template", [TAGGED, BARE], ids=["tagged", "bare"])
def test_a_required_call_is_a_call_that_fits_its_schema(own: Running, template: str, seed: int) -> None:
    own.service.serving.tokenizer.chat_template = template
    choice = ask(own, tool_choice="required", temperature=1.5, seed=seed).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls
    arguments = json.loads(call.function.arguments)
    if call.function.name == "weather":
        assert arguments["place"] in ("Oslo", "Rome") and 1 <= arguments["days"] <= 9
    else:
        assert call.function.name == "clock" and arguments == {}


def test_a_named_tool_is_the_one_called(tagged: Running) -> None:
    for name in ("weather", "clock"):
        named = {"type": "function", "function": {"name": name}}
        (call,) = ask(tagged, tool_choice=named, temperature=1.5, seed=1).choices[0].message.tool_calls
        assert call.function.name == name


def test_references_of_a_functions_schema_are_its_own(tagged: Running) -> None:
    parameters = {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/small"}},
        "required": ["a"],
        "additionalProperties": False,
        "$defs": {"small": {"type": "integer", "minimum": 3, "maximum": 5}},
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    (call,) = ask(tagged, tools=[tool], tool_choice="required", seed=2, temperature=1).choices[0].message.tool_calls
    assert 3 <= json.loads(call.function.arguments)["a"] <= 5


@pytest.mark.parametrize("template", [TAGGED, BARE], ids=["tagged", "bare"])
@pytest.mark.parametrize("reference", ["#/properties/a", "#"])
def test_references_into_a_functions_schema_begin_at_its_root(own: Running, template: str, reference: str) -> None:
    own.service.serving.tokenizer.chat_template = template
    small = {"type": "integer", "minimum": 3, "maximum": 5}
    parameters = {
        "type": "object",
        "properties": {"a": small, "b": {"anyOf": [{"$ref": reference}, {"const": 0}]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    found = set()
    for seed in range(8):
        answer = ask(own, tools=[tool], tool_choice="required", seed=seed, temperature=1.5)
        (call,) = answer.choices[0].message.tool_calls
        arguments = json.loads(call.function.arguments)
        assert list(arguments) == ["a", "b"] and 3 <= arguments["a"] <= 5
        found.add(type(arguments["b"]))
        inner = arguments["b"] if reference == "#" else {"a": arguments["b"]}
        assert arguments["b"] == 0 or 3 <= inner["a"] <= 5
    assert (dict if reference == "#" else int) in found


def test_a_strict_function_binds_calls_in_free_text(tagged: Running) -> None:
    strict = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
    grammar = None

    with scripted(tagged, says(tagged, "x")) as engine:
        ask(tagged, tools=[strict])
        grammar = engine.requests[0].sampling.grammar
    assert grammar is not None
    serving = tagged.service.serving
    free, bound = serving.grammars.matcher(grammar), serving.grammars.matcher(grammar)
    encode = lambda text: serving.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    for token in encode("anything < at all"):
        free.accept(token)
    assert free.allowed()[serving.eos[0]]
    for token in encode("I look: <tool_call>"):
        bound.accept(token)
    assert bound.allowed().nonzero().flatten().tolist() == encode("\n")


def test_strict_functions_are_refused_where_calls_cannot_be_held_to_them(bare: Running) -> None:
    strict = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
    with pytest.raises(openai.BadRequestError, match="strict functions are not supported with this model"):
        ask(bare, tools=[strict])


def test_a_conversation_with_calls_and_their_answers_reaches_the_template(tagged: Running) -> None:
    called = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}
    messages = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    ]
    body = {"messages": messages, "tools": [CLOCK]}
    ids = tagged.http("alice").post("/tokenize", json=body).json()["tokens"]
    text = tagged.http("alice").post("/detokenize", json={"tokens": ids}).json()["prompt"]
    assert '<tool_call>{"name": "clock", "arguments": {"zone": "UTC"}}</tool_call>' in text and "tool\nnoon" in text
    assert ask(tagged, messages=messages, max_tokens=2).choices


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": [CLOCK, CLOCK]}, "two tools have the same name"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "names g, which is none of the tools"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported together with tools"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "should match pattern"),
        ({"tools": [WRONG], "tool_choice": "required"}, "tools.0.function.parameters: Invalid type: x"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "y"}]}, "belongs to messages of role tool"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "needs the tool_call_id that it answers"),
    ],
)
def test_tools_that_make_no_sense_are_refused(tagged: Running, options: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        ask(tagged, **options)


@pytest.mark.parametrize(
    "arguments", ["{", "[]", '"x"', "", '{"a": "\\ud800"}', '{"\\udfff": 1}', '{"a": NaN}', '{"a": 1e999}']
)
def test_arguments_of_earlier_calls_must_be_objects(tagged: Running, arguments: str) -> None:
    called = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": arguments}}
    messages = [{"role": "assistant", "tool_calls": [called]}]
    said = "the arguments of the call to clock are not a JSON object in UTF-8"
    with pytest.raises(openai.BadRequestError, match=said) as refused:
        ask(tagged, messages=messages)
    assert (refused.value.code, refused.value.param) == ("invalid_value", "messages")
    tokenized = tagged.http("alice").post("/tokenize", json={"messages": messages})
    assert (tokenized.status_code, tokenized.json()["error"]["message"]) == (400, said)


@pytest.mark.parametrize(
    "asks",
    [
        {},
        {"tools": [CLOCK]},
        {"messages": [*QUESTION, {"role": "tool", "tool_call_id": "call_1", "content": "noon"}]},
    ],
    ids=["nothing", "tools", "a result"],
)
@pytest.mark.parametrize("route", ["/v1/chat/completions", "/tokenize"])
def test_a_model_without_a_chat_template_refuses_messages_with_and_without_tools(
    own: Running, route: str, asks: dict[str, Any]
) -> None:
    own.service.serving.tokenizer.chat_template = None
    response = own.http("alice").post(route, json={"model": MODEL, "messages": QUESTION} | asks)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "messages_invalid", "messages")
    assert error["message"].startswith("the model's chat template refuses these messages: ")
    assert "tokenizer.chat_template is not set" in error["message"]
