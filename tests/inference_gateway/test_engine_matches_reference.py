"""The engine gives everybody what the reference gives, whoever else is in the batch."""

import asyncio
from pathlib import Path

import pytest

from inference_gateway.engine.base import Finished
from seqr.plan import Plan
from tests.inference_gateway.support import Reference, ask, build_engine, prompts, resident, run

NEAR_TIE = 2e-5
SETS = (("alpha",), ("beta",), ("alpha", "gamma"), ("alpha", "beta", "gamma"), ())


@pytest.mark.parametrize("modes", [("prompt_evidence",), ("evidence",), ("prompt_evidence", "evidence", "per_token")])
def test_24_mixed_users_with_chunked_prefill_get_the_reference_answer(
    model_dir: Path, plan: Plan, modes: tuple[str, ...]
) -> None:
    residents = [resident(plan, silo, seed) for seed, silo in enumerate(("gamma", "alpha", "beta"))]
    reference = Reference(model_dir, plan, residents)
    asked: list[tuple[list[int], tuple[str, ...], str]] = []
    expected: list[list[int]] = []
    for text in prompts(60, longest=64):
        silos, mode = SETS[len(asked) % len(SETS)], modes[len(asked) % len(modes)]
        answer = reference.answer(text, silos, mode)
        # Where two silos all but tie, fp32 and fp64 may rightly differ.
        if reference.margin > NEAR_TIE:
            asked.append((text, silos, mode))
            expected.append(answer)
        if len(asked) == 24:
            break

    async def serve() -> list[list[int]]:
        engine = build_engine(model_dir, plan)
        await engine.start()
        try:
            for one in residents:
                await engine.load(one.key, one.adapter, one.statistics)
            keys = {one.key.silo_id: one.key for one in residents}
            jobs = [
                ask(engine, f"r{i}", text, [keys[s] for s in silos], mode)
                for i, (text, silos, mode) in enumerate(asked)
            ]
            answers = await asyncio.gather(*jobs)
        finally:
            await engine.stop()
        assert all(isinstance(answer.end, Finished) for answer in answers)
        return [answer.tokens for answer in answers]

    assert len(asked) == 24
    assert run(serve()) == expected
    others = [reference.answer(text, SETS[(i + 1) % 4], mode) for i, (text, _, mode) in enumerate(asked[:8])]
    # The test can tell sets apart. (Two sets may well agree on the one silo that a whole prompt speaks for.)
    assert sum(a != b for a, b in zip(expected[:8], others, strict=True)) >= 4
