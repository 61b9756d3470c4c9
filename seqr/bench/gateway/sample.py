"""What one run of one case gave, and what several of them say together."""

import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One run of all streams: seconds and processor seconds from start to end, generated tokens; first: per stream the
    seconds to its first token; whole: per stream the seconds to its last.
    """

    seconds: float
    cpu_seconds: float
    tokens: int
    first: tuple[float, ...]
    whole: tuple[float, ...] = ()


@dataclass(frozen=True)
class Case:
    """Something to measure. ``adapters``: how many are resident; ``against``: the case whose speed is 100%."""

    name: str
    adapters: int
    run: Callable[[], Awaitable[Sample]]
    against: str | None = None


async def interleave(cases: Sequence[Case], rounds: int, say: Callable[[str], None]) -> dict[str, list[Sample]]:
    """Every case once a round, after a round that is not kept; every second round in reverse, so that a machine that
    slows down slows all alike.
    """
    kept: dict[str, list[Sample]] = {case.name: [] for case in cases}
    for number in range(rounds + 1):
        for case in cases if number % 2 == 0 else cases[::-1]:
            say(f"[{number}/{rounds}] {case.name}")
            sample = await case.run()
            if number:
                kept[case.name].append(sample)
    return kept


def figures(case: Case, samples: dict[str, list[Sample]]) -> dict[str, Any]:
    """One row of the report: medians with their spread; ratios are medians of the rounds' own ratios."""
    mine = samples[case.name]
    speeds = sorted(one.tokens / one.seconds for one in mine)
    row: dict[str, Any] = {
        "case": case.name,
        "adapters": case.adapters,
        "tokens per second": statistics.median(speeds),
        "lowest": speeds[0],
        "highest": speeds[-1],
        "tokens per cpu second": statistics.median(one.tokens / one.cpu_seconds for one in mine),
        "rounds": len(mine),
    }
    first = sorted(wait for one in mine for wait in one.first)
    if first:
        row |= {"first token p50": quantile(first, 0.5), "first token p99": quantile(first, 0.99)}
    if mine[0].whole:
        row["between tokens p50"] = statistics.median(between_tokens(one) for one in mine)
    if case.against is not None:
        ratios = sorted(ratio_of(one, its) for one, its in zip(mine, samples[case.against], strict=True))
        row |= {"against": case.against, "ratio": statistics.median(ratios)}
        row |= {"lowest ratio": ratios[0], "highest ratio": ratios[-1]}
        theirs = samples[case.against]
        if mine[0].whole and theirs[0].whole:
            paces = [between_tokens(its) / between_tokens(one) for one, its in zip(mine, theirs, strict=True)]
            row["pace ratio"] = statistics.median(paces)
    return row


def between_tokens(one: Sample) -> float:
    """Seconds from one token of a stream to its next, once it has begun: the median stream's mean."""
    gaps = one.tokens / len(one.whole) - 1
    return statistics.median((end - first) / gaps for first, end in zip(one.first, one.whole, strict=True))


def ratio_of(one: Sample, other: Sample) -> float:
    """How many tokens a second the one gave for one of the other's."""
    return (one.tokens / one.seconds) / (other.tokens / other.seconds)


def quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that ``share`` of the values do not exceed."""
    rank = -int(-share * len(ordered) // 1)
    return ordered[min(len(ordered) - 1, max(0, rank - 1))]
