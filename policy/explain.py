"""Why a user may or may not use a silo: the winning path and every rule that lost. For admins, never for the user asked
about: it names silos that the user must not know of."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from datetime import datetime

from sqlalchemy import Connection, select

from policy.decision import Decision, Rule, at_one_version, permitted
from policy.ids import is_valid_id
from policy.models import Grant, GroupGroup, GroupUser, Silo
from policy.times import to_micros
from policy.users import user_status


@dataclass(frozen=True)
class AppliedRule:
    """A grant about this user and silo, the way it reaches the user, and what became of it.

    `outcome` is one of wins, redundant, overridden_by_deny, not_started, expired, revoked, and for a rule that would
    have counted but for the silo or user: silo_quarantined, silo_suspended, silo_vetoed, user_disabled.
    """

    rule: Rule
    path: tuple[str, ...]
    outcome: str


@dataclass(frozen=True)
class Explanation:
    """`because` is a sentence. `path` runs from user over groups to the deciding grant, and is empty without one."""

    user_id: str
    silo_id: str
    at: datetime
    allowed: bool
    because: str
    path: tuple[str, ...]
    winning: AppliedRule | None
    losing: tuple[AppliedRule, ...]
    policy_version: int


def explain(connection: Connection, user_id: str, silo_id: str, at: datetime) -> Explanation:
    """The outcome is `permitted`'s."""

    def read(_version: int) -> Explanation:
        decision = permitted(connection, user_id if is_valid_id(user_id) else "", at)
        return _explain(connection, decision, silo_id if is_valid_id(silo_id) else "", at)

    return replace(at_one_version(connection, read), user_id=user_id, silo_id=silo_id)


def _explain(connection: Connection, decision: Decision, silo_id: str, at: datetime) -> Explanation:
    user_id, allowed = decision.user_id, silo_id in decision.silos
    obstacle, sentence = _obstacle(connection, user_id, silo_id)
    paths = _paths(connection, user_id)
    winner_id = decision.reasons[silo_id].grant_id if allowed else None
    found = []
    for rule, revoked in _grants(connection, silo_id):
        if rule.subject in paths:
            path = (*paths[rule.subject], rule.grant_id)
            found.append((rule, path, _phase(rule, revoked, to_micros(at))))
    denied = any(phase is None and rule.effect == "deny" for rule, _, phase in found)
    applied: list[AppliedRule] = []
    for rule, path, phase in found:
        outcome = phase or obstacle
        if outcome is None and rule.effect == "deny":
            outcome = "redundant" if any(other.outcome == "wins" for other in applied) else "wins"
        elif outcome is None and denied:
            outcome = "overridden_by_deny"
        elif outcome is None:
            outcome = "wins" if rule.grant_id == winner_id else "redundant"
        applied.append(AppliedRule(rule, path, outcome))
    winning = next((one for one in applied if one.outcome == "wins"), None)
    losing = tuple(one for one in applied if one is not winning)
    if sentence is None:
        sentence = _sentence(winning)
    path = winning.path if winning else ()
    return Explanation(user_id, silo_id, at, allowed, sentence, path, winning, losing, decision.policy_version)


def _sentence(winning: AppliedRule | None) -> str:
    if winning is None:
        return "No rule matches, so access is denied."
    verb = "allowed" if winning.rule.effect == "allow" else "denied"
    return f"Access is {verb} by {winning.rule.grant_id} ({' -> '.join(winning.path[:-1])}): {winning.rule.reason}"


def _obstacle(connection: Connection, user_id: str, silo_id: str) -> tuple[str | None, str | None]:
    """Why no rule counts at all, as an outcome and a sentence."""
    status = user_status(connection, user_id)
    silo = connection.execute(select(Silo.__table__).where(Silo.silo_id == silo_id)).mappings().first()
    if status is None:
        return "user_unknown", "There is no such user, so access is denied."
    if silo is None:
        return "silo_unknown", "There is no such silo, so access is denied."
    if status != "active":
        return "user_disabled", "The user is disabled, so access is denied."
    if silo["vetoed_by"] is not None:
        return "silo_vetoed", f"The owner {silo['vetoed_by']} has vetoed the silo for everybody: {silo['veto_reason']}"
    if silo["status"] != "active":
        return f"silo_{silo['status']}", f"The silo is {silo['status']} for everybody: {silo['status_reason']}"
    return None, None


def _phase(rule: Rule, revoked: bool, at: int) -> str | None:
    if revoked:
        return "revoked"
    if rule.not_before > at:
        return "not_started"
    if rule.expires_at is not None and rule.expires_at <= at:
        return "expired"
    return None


def _grants(connection: Connection, silo_id: str) -> list[tuple[Rule, bool]]:
    columns = [getattr(Grant, name) for name in Rule._fields]
    query = (
        select(*columns, Grant.revoked_at).where(Grant.silo_id == silo_id).order_by(Grant.created_at, Grant.grant_id)
    )
    return [(Rule._make(row[:-1]), row[-1] is not None) for row in connection.execute(query)]


def _paths(connection: Connection, user_id: str) -> dict[str, tuple[str, ...]]:
    """For the user and every group around the user, the shortest chain of subjects that leads there."""
    start = f"user:{user_id}"
    paths: dict[str, tuple[str, ...]] = {start: (start,)}
    parents: dict[str, list[str]] = {}
    for child, parent in connection.execute(select(GroupGroup.child_id, GroupGroup.parent_id)):
        parents.setdefault(f"group:{child}", []).append(f"group:{parent}")
    direct = connection.execute(select(GroupUser.group_id).where(GroupUser.user_id == user_id)).scalars()
    parents[start] = [f"group:{group}" for group in direct]
    queue = deque([start])
    while queue:
        here = queue.popleft()
        for parent in sorted(parents.get(here, ())):
            if parent not in paths:
                paths[parent] = (*paths[here], parent)
                queue.append(parent)
    return paths
