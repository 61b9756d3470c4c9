"""JSON Schemas as grammars take them. Needs no library, so that the routes can name it."""

import json
from collections.abc import Mapping
from typing import Any

from inference_gateway.errors import GrammarInvalid

# JSON on one line, spaced as json.dumps does: free white space is where small models lose themselves.
JSON_STYLE = {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}
MAX_SCHEMA_CHARS = 65_536


def schema_text(schema: Mapping[str, Any]) -> str:
    """``schema`` with our style, as text. Raises GrammarInvalid."""
    if "x-guidance" in schema:
        raise GrammarInvalid("x-guidance is not a keyword of JSON Schema")
    text = json.dumps({**schema, "x-guidance": JSON_STYLE})
    if len(text) > MAX_SCHEMA_CHARS:
        raise GrammarInvalid(f"the schema has {len(text)} characters, at most {MAX_SCHEMA_CHARS} are allowed")
    return text


def json_part(schema: Mapping[str, Any]) -> str:
    """``schema`` as a part of a Lark grammar. Raises GrammarInvalid."""
    return f"%json {schema_text(schema)}"
