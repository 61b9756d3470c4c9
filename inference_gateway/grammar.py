"""Grammars for answers that must match something, through llguidance. Only this file knows the library.

A grammar is a string in llguidance's own notation, made by ``json_schema`` or ``lark`` and checked before a request
reaches the engine. https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits
from llguidance.hf import from_tokenizer

from inference_gateway.errors import EngineIncompatible, GrammarInvalid, GrammarTooComplex
from inference_gateway.json_rules import schema_text


class Grammars:
    """The grammars that answers of one tokenizer can be held to, and the bytes of its tokens.

    ``vocabulary``: how many logits the model has. ``eos``: the tokens that end an answer. Takes a second for a large
    vocabulary. Raises EngineIncompatible for a tokenizer that is not one of the Rust library's.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, eos: Sequence[int]):
        self._vocabulary = vocabulary
        # Schemas come from users. A lexer state takes up to 2 kB. The fuel is enough for a hundred fields of any format
        # or range, not for nested counts as in (a{1000}){50}, which would take a tenth of a second for every token.
        self._limits = LLParserLimits(
            max_grammar_size=50_000, max_lexer_states=20_000, initial_lexer_fuel=50_000, verbose_errors=False
        )
        try:
            self._tokenizer = from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=list(eos))
        except ValueError as error:
            raise EngineIncompatible(f"the base model's tokenizer cannot be used: {_short(str(error))}") from None

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token's text, which need not be whole characters."""
        return bytes(self._tokenizer.decode_bytes([token]))

    def json_schema(self, schema: Mapping[str, Any]) -> str:
        """The grammar of JSON that ``schema`` describes. Raises GrammarInvalid with the library's reason."""
        return self._checked(LLMatcher.grammar_from_json_schema(schema_text(schema)))

    def lark(self, rules: str) -> str:
        """The grammar of llguidance's Lark dialect. Raises GrammarInvalid with the library's reason."""
        return self._checked(LLMatcher.grammar_from_lark(rules))

    def _checked(self, grammar: str) -> str:
        problem = LLMatcher.validate_grammar(grammar, self._tokenizer, limits=self._limits)
        if problem:
            raise GrammarInvalid(_short(problem))
        return grammar

    def matcher(self, grammar: str) -> "GrammarMatcher":
        """A new matcher at the beginning of a grammar."""
        return GrammarMatcher(LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits), self._vocabulary)


class GrammarMatcher:
    """See ``inference_gateway.engine.sampling.Matcher``. When nothing more can follow, only the end may."""

    def __init__(self, matcher: LLMatcher, vocabulary: int):
        self._matcher = matcher
        self._vocabulary = vocabulary

    def allowed(self) -> torch.Tensor:
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        mask = np.unpackbits(bits, count=self._vocabulary, bitorder="little").view(bool)
        if not mask.any():
            raise GrammarTooComplex("the answer's grammar allows no token here; simplify the schema")
        return torch.from_numpy(mask)

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarTooComplex(f"the answer's grammar cannot be followed: {_short(self._matcher.get_error())}")


def _short(reason: str) -> str:
    return " ".join(reason.split())[:300]
