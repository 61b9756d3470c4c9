"""What a change would do to people: who gains and who loses which silo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from policy.decision import Decision


@dataclass(frozen=True)
class Diff:
    """Users with the silos they would gain or lose, both sorted; `policy_version` is the state compared with."""

    gains: dict[str, tuple[str, ...]]
    losses: dict[str, tuple[str, ...]]
    policy_version: int

    @property
    def is_empty(self) -> bool:
        return not self.gains and not self.losses


def compare(before: Mapping[str, Decision], after: Mapping[str, Decision], policy_version: int) -> Diff:
    return Diff(_more(before, after), _more(after, before), policy_version)


def _more(less: Mapping[str, Decision], more: Mapping[str, Decision]) -> dict[str, tuple[str, ...]]:
    """Silos in `more` that are not in `less`, by user."""
    found = {}
    for user in sorted(more, key=str.encode):
        had = set(less[user].silos) if user in less else set()
        extra = tuple(silo for silo in more[user].silos if silo not in had)
        if extra:
            found[user] = extra
    return found
