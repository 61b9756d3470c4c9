"""Prefix sharing: what one request has computed serves another only where it would have computed the same."""

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from inference_gateway.engine.base import AdapterKey, Finished, GenerationRequest, Tokens
from inference_gateway.engine.prefixes import block_name, chain_root
from inference_gateway.engine.transformers_engine import EngineLimits, TransformersEngine
from seqr.frame import NO_FRAME, Frame
from seqr.plan import Plan
from tests.inference_gateway.support import Reference, Resident, cached_numbers, prompts, resident, serve

TEXT = [7 + i % 250 for i in range(200)]
PAGE = 16
SHARING_MODES = ("prompt_evidence", "per_token")


class Prefilled:
    """Counts the prompt tokens that an engine computes for each pass."""

    def __init__(self, engine: TransformersEngine):
        self.engine = engine
        self.tokens: Counter[str] = Counter()
        self.first: dict[str, int] = {}
        self._begin = engine.steps.begin
        engine.steps.begin = self._spy  # type: ignore[method-assign]

    def _spy(self, batch: Any) -> Any:
        for one in batch.slices:
            self.first.setdefault(one.request_id, one.position)
            self.tokens[one.request_id] += one.length
        return self._begin(batch)

    async def ask(
        self,
        name: str,
        prompt: Sequence[int],
        residents: Iterable[Resident],
        mode: str = "per_token",
        salt: str = "",
        max_tokens: int = 4,
        frame: Frame = NO_FRAME,
    ) -> list[int]:
        keys = frozenset(one.key for one in residents)
        request = GenerationRequest(name, tuple(prompt), max_tokens, keys, mode, frame=frame, cache_salt=salt)
        tokens: list[int] = []
        async for event in self.engine.generate(request):
            if isinstance(event, Tokens):
                tokens.extend(event.ids)
            else:
                assert isinstance(event, Finished)
        return tokens


def sharing(model_dir: Path, plan: Plan, residents: list[Resident], scenario: Any, **limits: Any) -> Any:
    async def use(engine: TransformersEngine) -> Any:
        return await scenario(Prefilled(engine))

    chosen = {"max_batch_tokens": 64, "max_concurrent": 8, "page_size": PAGE, "prefix_sharing": True} | limits
    return serve(model_dir, plan, use, residents, **chosen)


@pytest.fixture
def alpha(plan: Plan) -> Resident:
    return resident(plan, "alpha", 1)


@pytest.fixture
def beta(plan: Plan) -> Resident:
    return resident(plan, "beta", 2)


def test_nothing_is_shared_unless_it_is_switched_on(model_dir: Path, plan: Plan, alpha: Resident) -> None:
    async def scenario(log: Prefilled) -> Any:
        await log.ask("one", TEXT, [alpha])
        await log.ask("two", TEXT, [alpha])
        return log.first, log.engine.info().prefix_queries

    first, queries = sharing(model_dir, plan, [alpha], scenario, prefix_sharing=False)
    assert first == {"one": 0, "two": 0} and queries == 0
    assert EngineLimits().prefix_sharing is False


@pytest.mark.parametrize("mode", SHARING_MODES)
def test_a_second_request_of_the_same_set_computes_less_and_answers_alike(
    model_dir: Path, plan: Plan, alpha: Resident, mode: str
) -> None:
    async def scenario(log: Prefilled) -> Any:
        one = await log.ask("one", TEXT, [alpha], mode)
        two = await log.ask("two", TEXT, [alpha], mode)
        return one, two, log.first, log.engine.info()

    one, two, first, info = sharing(model_dir, plan, [alpha], scenario)
    assert one == two == Reference(model_dir, plan, [alpha]).answer(TEXT, ["alpha"], mode, 4)
    assert first == {"one": 0, "two": 192}  # twelve pages; the last token is always computed
    assert (info.prefix_queries, info.prefix_hits) == (400, 192)


@pytest.mark.parametrize("mode", SHARING_MODES)
@pytest.mark.parametrize("others", [["beta"], ["alpha", "beta"], []])
def test_another_permitted_set_finds_nothing_of_it_and_answers_as_from_a_cold_start(
    model_dir: Path, plan: Plan, alpha: Resident, beta: Resident, mode: str, others: list[str]
) -> None:
    allowed = [one for one in (alpha, beta) if one.key.silo_id in others]

    async def scenario(log: Prefilled) -> Any:
        await log.ask("permitted", TEXT, [alpha], mode)
        return await log.ask("other", TEXT, allowed, mode), log.first, log.engine.info().prefix_hits

    async def cold(log: Prefilled) -> Any:
        return await log.ask("other", TEXT, allowed, mode)

    answer, first, hits = sharing(model_dir, plan, [alpha, beta], scenario)
    assert set(first.values()) == {0} and hits == 0
    assert answer == sharing(model_dir, plan, [alpha, beta], cold)


def test_a_conversation_goes_on_from_its_own_answer(model_dir: Path, plan: Plan, alpha: Resident) -> None:
    """Blocks filled while an answer was written serve the next turn, too."""
    start = TEXT[:40]

    async def scenario(log: Prefilled) -> Any:
        answer = await log.ask("one", start, [alpha], max_tokens=40)
        longer = start + answer + [11, 12, 13]
        return longer, await log.ask("two", longer, [alpha]), log.first["two"]

    longer, answer, first = sharing(model_dir, plan, [alpha], scenario)
    written = len(longer) - 3 - 1  # the last token of an answer is never an input
    assert first == min(written, len(longer) - 1) // PAGE * PAGE > len(start)
    assert answer == Reference(model_dir, plan, [alpha]).answer(longer, ["alpha"], "per_token", 4)


def test_another_salt_or_another_mode_finds_nothing(model_dir: Path, plan: Plan, alpha: Resident) -> None:
    async def scenario(log: Prefilled) -> Any:
        await log.ask("one", TEXT, [alpha], salt="alice")
        await log.ask("salt", TEXT, [alpha], salt="bob")
        await log.ask("mode", TEXT, [alpha], "prompt_evidence", salt="alice")
        await log.ask("again", TEXT, [alpha], salt="alice")
        return log.first

    assert sharing(model_dir, plan, [alpha], scenario) == {"one": 0, "salt": 0, "mode": 0, "again": 192}


def test_passes_that_gather_evidence_read_every_token_that_is_some(
    model_dir: Path, plan: Plan, alpha: Resident, beta: Resident
) -> None:
    async def scenario(log: Prefilled) -> Any:
        for name in ("one", "two"):
            await log.ask(name, TEXT, [alpha, beta], "evidence")
        for name in ("three", "four"):
            await log.ask(name, TEXT, [alpha, beta], "prompt_evidence")
        return log.first

    first = sharing(model_dir, plan, [alpha, beta], scenario)
    assert first == {"one": 0, "two": 0, "three/reading": 0, "three": 0, "four/reading": 16, "four": 192}


LONG = [5 + (i * i) % 251 for i in range(330)]
NEXT_TURN = [*LONG[:280], *(9 + (7 * i) % 230 for i in range(40))]


def test_a_pass_that_reads_finds_what_is_no_evidence_and_computes_the_rest(
    model_dir: Path, plan: Plan, alpha: Resident, beta: Resident
) -> None:
    """Words more than 180 places before the last count nothing."""

    async def scenario(log: Prefilled) -> Any:
        await log.ask("one", LONG, [alpha, beta], "prompt_evidence")
        answer = await log.ask("two", NEXT_TURN, [alpha, beta], "prompt_evidence")
        return answer, log.first, log.tokens

    answer, first, tokens = sharing(model_dir, plan, [alpha, beta], scenario)
    found = (len(NEXT_TURN) - 180) // PAGE * PAGE
    assert (first["one/reading"], first["two/reading"]) == (0, found) and found == 128
    assert tokens["two/reading"] == len(NEXT_TURN) - found
    reference = Reference(model_dir, plan, [alpha, beta])
    assert answer == reference.answer(NEXT_TURN, ["alpha", "beta"], "prompt_evidence", 4)


def test_a_pass_that_reads_finds_the_beginning_of_the_chats_frame(
    model_dir: Path, plan: Plan, alpha: Resident, beta: Resident
) -> None:
    frame = Frame(40, range(57, 60))

    async def scenario(log: Prefilled) -> Any:
        for name, last in (("one", 60), ("two", 61)):
            text = [*TEXT[:50], *range(last, last + 10)]
            await log.ask(name, text, [alpha, beta], "prompt_evidence", frame=frame)
        return log.first

    first = sharing(model_dir, plan, [alpha, beta], scenario)
    assert (first["one/reading"], first["two/reading"]) == (0, 40 // PAGE * PAGE)


def test_what_a_prompt_says_does_not_depend_on_what_was_found_in_the_cache(
    model_dir: Path, plan: Plan, alpha: Resident, beta: Resident
) -> None:
    async def margin(log: Prefilled, name: str) -> float | None:
        keys = frozenset((alpha.key, beta.key))
        request = GenerationRequest(name, tuple(NEXT_TURN), 1, keys, "prompt_evidence", attribution=True)
        events = [event async for event in log.engine.generate(request)]
        assert isinstance(events[0], Tokens)
        return events[0].shares[0].margin

    async def scenario(log: Prefilled) -> Any:
        cold = await margin(log, "cold")
        return cold, await margin(log, "warm"), log.first["warm/reading"]

    cold, warm, first = sharing(model_dir, plan, [alpha, beta], scenario)
    assert first > 0 and cold > 0
    assert warm == pytest.approx(cold, rel=1e-4)


@pytest.mark.parametrize("others", [["beta", "gamma"], ["alpha", "beta", "gamma"]])
def test_what_one_set_has_read_is_read_again_for_another(
    model_dir: Path, plan: Plan, alpha: Resident, beta: Resident, others: list[str]
) -> None:
    all_three = [alpha, beta, resident(plan, "gamma", 3)]

    async def scenario(log: Prefilled) -> Any:
        await log.ask("one", LONG, [alpha, beta], "prompt_evidence")
        await log.ask("two", LONG, [one for one in all_three if one.key.silo_id in others], "prompt_evidence")
        return log.first["two/reading"]

    assert sharing(model_dir, plan, all_three, scenario) == 0


def test_blocks_that_a_pass_fills_in_its_last_step_are_kept(model_dir: Path, plan: Plan, alpha: Resident) -> None:
    async def scenario(log: Prefilled) -> Any:
        for name in ("one", "two"):
            await log.ask(name, TEXT[:60], [alpha], max_tokens=1)
        return log.first

    assert sharing(model_dir, plan, [alpha], scenario) == {"one": 0, "two": 48}


def test_prompts_that_speak_for_different_silos_share_nothing(
    model_dir: Path, plan: Plan, alpha: Resident, beta: Resident
) -> None:
    """Their beginnings are the same tokens, but each was shaped by another silo."""
    head = TEXT[: 2 * PAGE]
    tails = prompts(12, seed=4)

    async def scenario(log: Prefilled) -> Any:
        winners = []
        for i, tail in enumerate(tails):
            keys = frozenset((alpha.key, beta.key))
            request = GenerationRequest(f"r{i}", (*head, *tail), 1, keys, "prompt_evidence", attribution=True)
            events = [event async for event in log.engine.generate(request)]
            winners.append(*events[-1].shares.total)  # type: ignore[union-attr]
        return winners, [log.first[f"r{i}"] for i in range(len(tails))]

    winners, first = sharing(model_dir, plan, [alpha, beta], scenario)
    assert set(winners) == {"alpha", "beta"}  # else this tests nothing
    for i, winner in enumerate(winners):
        assert (first[i] >= len(head)) is (winner in winners[:i])


def test_blocks_die_with_the_library_they_belong_to(
    model_dir: Path, plan: Plan, alpha: Resident, beta: Resident
) -> None:
    async def scenario(log: Prefilled) -> Any:
        await log.ask("one", TEXT, [alpha])
        await log.engine.load(beta.key, beta.adapter, beta.statistics)
        await log.ask("two", TEXT, [alpha])
        await log.ask("three", TEXT, [alpha])
        before = cached_numbers(log.engine)
        await log.engine.revoke(alpha.key)
        return log.first, before, cached_numbers(log.engine), log.engine.info().kv_blocks_used

    first, before, after, used = sharing(model_dir, plan, [alpha], scenario)
    assert first == {"one": 0, "two": 0, "three": 192}
    assert before > 0 and after == 0 and used == 0


def test_a_full_cache_gives_up_shared_blocks_and_no_answer_changes(
    model_dir: Path, plan: Plan, alpha: Resident
) -> None:
    texts = [TEXT[:48] + text[:20] for text in prompts(6, seed=5, longest=60)]

    async def scenario(log: Prefilled) -> Any:
        jobs = [log.ask(f"r{i}", text, [alpha], max_tokens=30) for i, text in enumerate(texts)]
        first = await asyncio.gather(*jobs)
        again = await asyncio.gather(*(log.ask(f"s{i}", t, [alpha], max_tokens=30) for i, t in enumerate(texts)))
        return first, again, log.engine.info()

    first, again, info = sharing(model_dir, plan, [alpha], scenario, kv_tokens=192, max_concurrent=6)
    reference = Reference(model_dir, plan, [alpha])
    assert first == again == [reference.answer(text, ["alpha"], "per_token", 30) for text in texts]
    assert info.preemptions > 0 and info.kv_blocks_used == 0


def test_a_full_cache_makes_no_pass_that_reads_forget_what_a_prompt_says(
    model_dir: Path, plan: Plan, alpha: Resident, beta: Resident
) -> None:
    texts = [LONG[:200] + text[:20] for text in prompts(4, seed=5, longest=60)]

    async def scenario(log: Prefilled) -> Any:
        jobs = (log.ask(f"r{i}", text, [alpha, beta], "prompt_evidence", max_tokens=16) for i, text in enumerate(texts))
        return await asyncio.gather(*jobs), log.engine.info(), log.first

    answers, info, first = sharing(model_dir, plan, [alpha, beta], scenario, kv_tokens=288)
    roomy, *_ = sharing(model_dir, plan, [alpha, beta], scenario, prefix_sharing=False)
    assert answers == roomy
    assert info.preemptions > 0 and info.kv_blocks_used == 0
    assert any(start > 0 for name, start in first.items() if name.endswith("/reading"))


def test_a_root_differs_with_everything_that_keys_and_values_depend_on() -> None:
    key = AdapterKey("alpha", 1, "aa")

    def root(
        keys: Iterable[AdapterKey] = (key,), mode: str = "per_token", version: int = 1, winner: str | None = None,
        salt: str = "", reading: bool = False,
    ) -> bytes:  # fmt: skip
        request = GenerationRequest("r", (1,), 1, frozenset(keys), mode, cache_salt=salt)
        return chain_root(request, version, winner, reading)

    roots = [
        root(),
        root(keys=()),
        root(keys=[AdapterKey("alpha", 2, "aa")]),
        root(keys=[AdapterKey("alpha", 1, "ab")]),
        root(keys=[key, AdapterKey("beta", 1, "aa")]),
        root(mode="prompt_evidence"),
        root(mode="prompt_evidence", reading=True),
        root(mode="prompt_evidence", winner="alpha"),
        root(version=2),
        root(salt="alice"),
    ]
    assert len(set(roots)) == len(roots) and root() == roots[0]
    assert block_name(roots[0], [1, 2]) != block_name(roots[1], [1, 2])
    assert block_name(roots[0], [1, 2]) != block_name(roots[0], [2, 1])
