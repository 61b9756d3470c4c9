"""Calls of tools in an answer: how a model writes them, and how to hold it to them."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from inference_gateway.json_rules import json_part
from inference_gateway.text import beginning

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
# The JSON Schemas of functions' arguments, by name.
Functions = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class ToolCall:
    """One call; ``arguments`` is a JSON object as text."""

    name: str
    arguments: str


class CallReader(Protocol):
    """Parts an answer's text, as it grows, into what is for reading and what is a call."""

    calls: list[ToolCall]

    def push(self, text: str) -> str:
        """Take in text; returns what is certainly no part of a call. New calls are in ``calls``."""
        ...

    def finish(self) -> str:
        """What was held back and is no call, when nothing follows."""
        ...


class ToolFormat(Protocol):
    """How a family of models writes calls."""

    def reader(self, names: Collection[str]) -> CallReader:
        """Reads calls of the functions of these names; all else is text."""
        ...

    def grammar(self, functions: Functions) -> str:
        """A Lark grammar of exactly one call of one of ``functions``. Raises GrammarInvalid."""
        ...

    def free_grammar(self, functions: Functions) -> str | None:
        """A Lark grammar of any text in which calls of ``functions`` may stand, and no other calls. None: impossible.

        Raises GrammarInvalid.
        """
        ...


class TaggedCalls:
    """``<tool_call>{"name": ..., "arguments": ...}</tool_call>``, as Hermes and Qwen write it."""

    BEGIN, END = "<tool_call>", "</tool_call>"

    def reader(self, names: Collection[str]) -> "TaggedReader":
        return TaggedReader(names)

    def grammar(self, functions: Functions) -> str:
        return f'start: "{self.BEGIN}\\n" call "\\n{self.END}"\n' + _calls(functions, "arguments")

    def free_grammar(self, functions: Functions) -> str | None:
        rules = (
            "start: tagged* rest",
            "rest: TEXT",
            "TEXT: /(.|\\n)*/",
            f'begin[lazy]: TEXT "{self.BEGIN}"',
            f'tagged: begin "\\n" call "\\n{self.END}"',
        )
        return "\n".join(rules) + "\n" + _calls(functions, "arguments")


class TaggedReader:
    """See ``CallReader``."""

    def __init__(self, names: Collection[str]) -> None:
        self.calls: list[ToolCall] = []
        self._names = names
        self._held = ""
        self._looked = 0  # how far the held call has been searched for its end
        self._after_call = False

    def push(self, text: str) -> str:
        self._held += text
        out = ""
        while (begin := self._held.find(TaggedCalls.BEGIN)) >= 0:
            out, self._held = out + self._held[:begin], self._held[begin:]
            end = self._end()
            if end < 0:
                return self._between(out)
            whole, self._held = self._held[: end + len(TaggedCalls.END)], self._held[end + len(TaggedCalls.END) :]
            call = self._call(whole[len(TaggedCalls.BEGIN) : end])
            if call is None:
                out += whole
            else:
                out = self._between(out)
                self.calls.append(call)
                self._after_call = True
        sure = len(self._held) - beginning(self._held, TaggedCalls.BEGIN)
        out, self._held = out + self._held[:sure], self._held[sure:]
        return self._between(out)

    def _end(self) -> int:
        """Where the tag stands that ends the call with which ``_held`` begins; -1 while there is none.

        A tag in one of the call's strings is a part of it. Where no call comes of that, the first tag ends the text.
        """
        begin = len(TaggedCalls.BEGIN)
        while (end := self._held.find(TaggedCalls.END, self._looked)) >= 0:
            self._looked = end + 1
            if not _ends_in_string(self._held[begin:end]):
                self._looked = 0
                return end if self._call(self._held[begin:end]) else self._held.find(TaggedCalls.END)
        return -1

    def _call(self, text: str) -> ToolCall | None:
        return _call(text, "arguments", self._names)

    def _between(self, out: str) -> str:
        """White space after a call only parts it from what follows."""
        if self._after_call:
            out = out.lstrip()
            self._after_call = not out
        return out

    def finish(self) -> str:
        rest, self._held = self._held, ""
        # Some models leave the end tag to the end of the answer.
        call = self._call(rest.removeprefix(TaggedCalls.BEGIN)) if rest.startswith(TaggedCalls.BEGIN) else None
        if call is not None:
            self.calls.append(call)
            return ""
        return self._between(rest)


class BareCalls:
    """An answer that is nothing but ``{"name": ..., "parameters": ...}``, as Llama 3 writes it."""

    def reader(self, names: Collection[str]) -> "BareReader":
        return BareReader(names)

    def grammar(self, functions: Functions) -> str:
        return "start: call\n" + _calls(functions, "parameters")

    def free_grammar(self, functions: Functions) -> str | None:
        return None


class BareReader:
    """See ``CallReader``. An answer that does not begin with a brace is text from the first character on."""

    def __init__(self, names: Collection[str]) -> None:
        self.calls: list[ToolCall] = []
        self._names = names
        self._held: str | None = ""

    def push(self, text: str) -> str:
        if self._held is None:
            return text
        self._held += text
        begun = self._held.lstrip()
        if not begun or begun.startswith("{"):
            return ""
        out, self._held = self._held, None
        return out

    def finish(self) -> str:
        held, self._held = self._held or "", None
        calls = [_call(part, "parameters", self._names) for part in _objects(held)]
        if calls and all(calls):
            self.calls += [call for call in calls if call]
            return ""
        return held


def format_of(template: str) -> ToolFormat | None:
    """How a model with this chat template writes calls; None when the template knows no tools or in another way."""
    if not re.search(r"\btools\b", template):
        return None
    if TaggedCalls.BEGIN in template and "<function=" not in template:
        return TaggedCalls()
    if '"parameters"' in template and TaggedCalls.BEGIN not in template:
        return BareCalls()
    return None


def _calls(functions: Functions, arguments: str) -> str:
    """The rule ``call`` and those that it needs."""
    rules = ["call: " + " | ".join(f"call_{index}" for index in range(len(functions)))]
    for index, (name, schema) in enumerate(functions.items()):
        begin = f'{{"name": {json.dumps(name)}, "{arguments}": '
        rules.append(f'call_{index}: {json.dumps(begin)} arguments_{index} "}}"')
        # A document of its own, so that its references lead into itself.
        rules.append(f"arguments_{index}: {json_part(schema or ANY_OBJECT)}")
    return "\n".join(rules) + "\n"


def _objects(text: str) -> Sequence[str]:
    """The JSON objects that ``text`` is made of, parted by white space, commas or semicolons; empty if it is not."""
    decoder, at, found = json.JSONDecoder(), 0, []
    while at < len(text):
        if text[at] in " \t\r\n;,":
            at += 1
            continue
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return ()
        found.append(text[at:end])
        at = end
    return found


def json_object(text: str) -> dict[str, Any] | None:
    """The JSON object that ``text`` is. None if it is none, or holds what JSON in UTF-8 cannot say: NaN, numbers beyond
    a double, lone surrogates.
    """
    try:
        document = json.loads(text)
        json.dumps(document, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _call(text: str, arguments: str, names: Collection[str]) -> ToolCall | None:
    document = json_object(text)
    if document is None:
        return None
    name, given = document.get("name"), document.get(arguments, {})
    if not isinstance(name, str) or name not in names or not isinstance(given, dict):
        return None
    return ToolCall(name, json.dumps(given, ensure_ascii=False))


def _ends_in_string(text: str) -> bool:
    """Whether ``text`` is the beginning of a JSON document, cut off inside a string."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.msg.startswith("Unterminated string")
    except (ValueError, RecursionError):
        pass
    return False
