"""Every token is told which silos shaped it, in how many modules, and by what margin."""

import asyncio
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from inference_gateway.engine.base import Finished, GenerationRequest, Tokens, TokenShares
from inference_gateway.engine.transformers_engine import TransformersEngine
from seqr.frame import Frame
from seqr.plan import Plan
from tests.inference_gateway.support import Reference, Resident, prompts, resident, serve

MODES = ("prompt_evidence", "evidence", "per_token")
NEAR_TIE = 2e-5


class SharesReference(Reference):
    """The reference, noting at every module what the last token's permitted values were."""

    _passes: list[list[list[float]]]

    def shares(self, prompt: Sequence[int], silos: Sequence[str], mode: str) -> list[TokenShares]:
        """What each token of the answer must be told."""
        self._passes = []
        self.answer(prompt, silos, mode)
        passes = self._passes[1:] if mode == "prompt_evidence" else self._passes
        named = [one.key.silo_id for one in self._residents if one.key.silo_id in silos]
        out = []
        for modules in passes:
            won = Counter(named[values.index(max(values))] for values in modules if values)
            leads = [sorted(values)[-1] - sorted(values)[-2] for values in modules if len(values) > 1]
            margin = sum(leads) / len(leads) if leads else None
            if margin is not None and mode == "prompt_evidence":
                margin /= len(self._plan.modules)  # its values are sums over the modules
            out.append(TokenShares(won, len(self._plan.modules), margin))
        return out

    def _forward(self, tokens: Sequence[int]) -> torch.Tensor:
        self._passes.append([])
        return super()._forward(tokens)

    def _note_margin(self, value: torch.Tensor) -> None:
        super()._note_margin(value)
        self._passes[-1].append(value[-1, self._permitted].tolist())


async def told(
    engine: TransformersEngine,
    name: str,
    prompt: Sequence[int],
    residents: Iterable[Resident],
    mode: str,
    attribution: bool = True,
    frame: Frame | None = None,
) -> tuple[list[TokenShares], Finished, int]:
    """The shares of each token of an answer, its end and how many tokens it has."""
    keys = frozenset(one.key for one in residents)
    request = GenerationRequest(name, tuple(prompt), 12, keys, mode, attribution=attribution, frame=frame or Frame())
    shares: list[TokenShares] = []
    tokens = 0
    async for event in engine.generate(request):
        if isinstance(event, Tokens):
            assert len(event.shares) == (len(event.ids) if attribution else 0)
            shares.extend(event.shares)
            tokens += len(event.ids)
        else:
            assert isinstance(event, Finished)
            return shares, event, tokens
    raise AssertionError("the stream ended without an end")


@pytest.fixture
def residents(plan: Plan) -> list[Resident]:
    return [resident(plan, silo, seed) for seed, silo in enumerate(("gamma", "alpha", "beta"))]


def same(got: list[TokenShares], expected: list[TokenShares]) -> bool:
    def close(a: float | None, b: float | None) -> bool:
        return a == b if a is None or b is None else math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-5)

    return len(got) == len(expected) and all(
        (dict(a.counts), a.choices) == (dict(b.counts), b.choices) and close(a.margin, b.margin)
        for a, b in zip(got, expected, strict=True)
    )


@pytest.mark.parametrize("mode", MODES)
def test_each_tokens_shares_are_those_of_the_pass_that_produced_it(
    model_dir: Path, plan: Plan, residents: list[Resident], mode: str
) -> None:
    """Prompts in chunks, answers in one batch: counts and margins as a slow reference has them."""
    reference = SharesReference(model_dir, plan, residents)
    sets = (("alpha", "beta", "gamma"), ("alpha", "gamma"), ("beta",), ())
    asked, expected = [], []
    for text in prompts(40, longest=64):
        silos = sets[len(asked) % len(sets)]
        shares = reference.shares(text, silos, mode)
        if reference.margin > NEAR_TIE and len(text) > 1:
            asked.append((text, [one for one in residents if one.key.silo_id in silos]))
            expected.append(shares)
        if len(asked) == 8:
            break

    async def use(engine: TransformersEngine) -> Any:
        jobs = (told(engine, f"r{i}", text, allowed, mode) for i, (text, allowed) in enumerate(asked))
        return await asyncio.gather(*jobs)

    answers = serve(model_dir, plan, use, residents)
    assert len(answers) == 8
    assert all(same(shares, wanted) for (shares, _, _), wanted in zip(answers, expected, strict=True))
    assert any(one.margin for one in answers[0][0]) and answers[2][0][0].margin is None


@pytest.mark.parametrize("mode", MODES)
def test_the_summary_adds_up_what_the_tokens_were_told(
    model_dir: Path, plan: Plan, residents: list[Resident], mode: str
) -> None:
    async def use(engine: TransformersEngine) -> Any:
        return await told(engine, "mine", prompts(1)[0], residents, mode)

    shares, end, tokens = serve(model_dir, plan, use, residents)
    total: Counter[str] = Counter()
    for one in shares:
        total.update(one.counts)
    assert end.shares is not None and end.shares.answer == total
    assert end.shares.answer_choices == tokens * len(plan.modules)


@pytest.mark.parametrize("mode", MODES)
def test_tokens_come_with_the_sums_of_all_until_then_and_the_last_with_the_summary(
    model_dir: Path, plan: Plan, residents: list[Resident], mode: str
) -> None:
    async def use(engine: TransformersEngine) -> Any:
        keys = frozenset(one.key for one in residents)
        request = GenerationRequest("mine", tuple(prompts(1)[0]), 12, keys, mode, attribution=True)
        return [event async for event in engine.generate(request)]

    *events, end = serve(model_dir, plan, use, residents)
    sums: Counter[str] = Counter()
    answer_choices = 0
    for event in events:
        for one in event.shares:
            sums.update(one.counts)
            answer_choices += one.choices
        assert (event.totals.answer, event.totals.answer_choices) == (sums, answer_choices)
    assert len(events) > 1 and events[-1].totals == end.shares


@pytest.mark.parametrize("mode", MODES)
def test_a_forbidden_silo_appears_in_no_share_and_in_no_margin(
    model_dir: Path, plan: Plan, residents: list[Resident], mode: str
) -> None:
    """A forbidden adapter that would win every choice changes nothing of what a token is told."""
    winner = resident(plan, "aaa", 77)
    loud = Resident(winner.key, winner.adapter, dict.fromkeys(winner.statistics, (-1e6, 1.0)))

    async def use(engine: TransformersEngine) -> Any:
        return await told(engine, "mine", prompts(1)[0], residents[:2], mode)

    assert serve(model_dir, plan, use, [*residents, loud]) == serve(model_dir, plan, use, residents[:2])


def test_who_does_not_ask_for_attribution_is_told_nothing(
    model_dir: Path, plan: Plan, residents: list[Resident]
) -> None:
    async def use(engine: TransformersEngine) -> Any:
        return await told(engine, "mine", prompts(1)[0], residents, "per_token", attribution=False)

    shares, end, tokens = serve(model_dir, plan, use, residents)
    assert shares == [] and end.shares is None and tokens > 0


def test_a_chats_frame_has_no_part_in_a_prompts_margin(model_dir: Path, plan: Plan, residents: list[Resident]) -> None:
    """The margin is a mean over the words alone: the same words give the same one, whatever stands after them."""
    words = prompts(1)[0]
    tail = [9] * 16

    async def use(engine: TransformersEngine) -> Any:
        bare, _, _ = await told(engine, "bare", words, residents, "prompt_evidence")
        frame = Frame(1, range(len(words), len(words) + len(tail)))
        framed, _, _ = await told(engine, "framed", words + tail, residents, "prompt_evidence", frame=frame)
        return bare[0].margin, framed[0].margin

    bare, framed = serve(model_dir, plan, use, residents)
    assert bare == pytest.approx(framed, rel=1e-3) and bare > 0
