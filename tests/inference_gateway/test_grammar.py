"""Grammars hold an answer to what they describe, end it when it is complete, and fail alone."""

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from inference_gateway.engine.base import Failed, Finished, Sampling
from inference_gateway.engine.transformers_engine import EngineLimits, TransformersEngine
from inference_gateway.errors import EngineIncompatible, GrammarInvalid, GrammarTooComplex
from inference_gateway.grammar import Grammars
from seqr.models import load_base_model
from seqr.plan import Plan
from seqr.routed_linear import adapt_model
from seqr.shared_a import verify_a
from tests.inference_gateway.support import EOS, OpenGuard, ask, prompts, run

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "é", None]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Any:
    return load_base_model(model_dir, torch.float32)[1]


@pytest.fixture(scope="module")
def grammars(tokenizer: Any) -> Grammars:
    return Grammars(tokenizer, len(tokenizer), [EOS])


def walk(grammars: Grammars, grammar: str, seed: int, most: int = 300) -> list[int]:
    """Random allowed tokens until only the end is left."""
    matcher, draw, ids = grammars.matcher(grammar), random.Random(seed), []
    while len(ids) < most:
        token = draw.choice(matcher.allowed().nonzero().flatten().tolist())
        if token == EOS:
            return ids
        matcher.accept(token)
        ids.append(token)
    raise AssertionError("no end")


@pytest.mark.parametrize("seed", range(8))
def test_any_allowed_way_through_a_schema_ends_in_what_it_describes(
    grammars: Grammars, tokenizer: Any, seed: int
) -> None:
    text = tokenizer.decode(walk(grammars, grammars.json_schema(SCHEMA), seed))
    document = json.loads(text)
    assert text == json.dumps(document, ensure_ascii=False)  # on one line, spaced as usual
    assert list(document) == ["a", "b"] and 0 <= document["a"] <= 99 and document["b"] in ("x", "é", None)


def test_a_complete_answer_can_only_end(grammars: Grammars, tokenizer: Any) -> None:
    matcher = grammars.matcher(grammars.json_schema(SCHEMA))
    for token in tokenizer('{"a": 1, "b": "x"}', add_special_tokens=False)["input_ids"]:
        assert not matcher.allowed()[EOS]
        matcher.accept(token)
    assert matcher.allowed().nonzero().flatten().tolist() == [EOS]


def test_a_token_that_a_grammar_forbids_is_an_error_of_the_matcher(grammars: Grammars) -> None:
    matcher = grammars.matcher(grammars.json_schema(SCHEMA))
    with pytest.raises(GrammarTooComplex, match="the answer's grammar cannot be followed"):
        matcher.accept(100)
        matcher.allowed()


def test_rules_that_are_no_grammar_are_refused(grammars: Grammars) -> None:
    with pytest.raises(GrammarInvalid):
        grammars.lark("start: nowhere")


def test_tokens_have_bytes_even_where_they_are_no_characters(grammars: Grammars, tokenizer: Any) -> None:
    ids = tokenizer("é", add_special_tokens=False)["input_ids"]
    assert [grammars.token_bytes(one) for one in ids] == [b"\xc3", b"\xa9"]


def test_a_tokenizer_that_is_not_the_rust_librarys_is_named() -> None:
    with pytest.raises(EngineIncompatible, match="tokenizer cannot be used: Only fast tokenizers are supported"):
        Grammars(object(), 259, [EOS])


class Broken:
    """A grammar that turns out too complex after three tokens, or breaks."""

    def __init__(self, error: Exception):
        self._error = error
        self._left = 3

    def allowed(self) -> torch.Tensor:
        if not self._left:
            raise self._error
        return torch.ones(259, dtype=torch.bool)

    def accept(self, _token: int) -> None:
        self._left -= 1


@pytest.mark.parametrize(
    ("error", "code"),
    [(GrammarTooComplex("too complex"), "grammar_too_complex"), (RuntimeError("x"), "generation_failed")],
)
def test_a_grammar_that_fails_ends_its_own_request_alone(
    model_dir: Path, plan: Plan, error: Exception, code: str
) -> None:
    async def session() -> Any:
        model, _ = load_base_model(model_dir, torch.float32, "sdpa")
        adapt_model(model, plan, verify_a(plan))
        limits = EngineLimits(max_concurrent=4, max_batch_tokens=32, kv_tokens=1024, page_size=16)
        engine = TransformersEngine(model, plan, OpenGuard(), [EOS], limits, lambda _grammar: Broken(error))
        await engine.start()
        try:
            alone = await ask(engine, "alone", prompts(1)[0], [])
            bound, free = await asyncio.gather(
                ask(engine, "bound", prompts(1)[0], [], sampling=Sampling(grammar="any")),
                ask(engine, "free", prompts(1)[0], []),
            )
            return alone, bound, free
        finally:
            await engine.stop()

    alone, bound, free = run(session())
    assert isinstance(bound.end, Failed) and bound.end.code == code and len(bound.tokens) == 3
    assert isinstance(free.end, Finished)
    assert free.tokens == alone.tokens
