"""Who may use which silo. The order of resolution:

1. A user that is unknown or disabled, and a silo that is not active or is vetoed by its owner, take part in nothing.
2. A grant counts from its start until before its end, unless revoked, for its user or for everybody in its group
   and in the groups nested inside it.
3. If any counting grant denies the silo, access is denied.
4. If any counting grant allows it, access is allowed; if no rule matches, access is denied.

`resolve` decides 3 and 4 and what time has to say, for `permitted`, `permitted_for_all` and `explain` alike. Which
rules reach a user (1 and 2) `permitted` asks the database, for one user; `permitted_for_all` works it out for
everybody. Tests hold both to one reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, NamedTuple, TypeVar

from sqlalchemy import Connection, select, text

from policy.errors import PolicyBusy, SchemaOutdated
from policy.ids import is_valid_id
from policy.models import Grant, GroupGroup, GroupUser, PolicyState, Silo, User
from policy.times import from_micros, to_micros

T = TypeVar("T")
ATTEMPTS: Final = 10


class Rule(NamedTuple):
    """A grant as it bears on one user."""

    grant_id: str
    user_id: str | None
    group_id: str | None
    silo_id: str
    effect: str
    not_before: int
    expires_at: int | None
    reason: str

    @property
    def subject(self) -> str:
        return f"user:{self.user_id}" if self.user_id is not None else f"group:{self.group_id}"


class Reason(NamedTuple):
    """The allowing grant that a permitted silo rests on (of several, the one that lasts longest)."""

    grant_id: str
    subject: str
    expires_at: datetime | None
    reason: str


@dataclass(frozen=True)
class Decision:
    """The silos a user may use at one instant, sorted by the bytes of their ids.

    It holds as long as the policy version is `policy_version` and the clock is before `valid_until`, the next start
    or end of any grant that touches the user: the version does not move when a grant merely runs out.
    """

    user_id: str
    silos: tuple[str, ...]
    policy_version: int
    reasons: Mapping[str, Reason]
    valid_until: datetime | None

    def allows(self, silo_id: str) -> bool:
        """Whether the user may use the silo. Unknown silos are as forbidden ones."""
        return silo_id in self.silos

    def still_holds(self, policy_version: int, at: datetime) -> bool:
        return policy_version == self.policy_version and (self.valid_until is None or at < self.valid_until)


# One statement, hence one snapshot of version, members, grants and silos on either database.
_RULES_OF_ONE: Final = text("""
WITH RECURSIVE asker(user_id) AS (
    SELECT user_id FROM users WHERE user_id = :user_id AND status = 'active'
),
around(group_id) AS (
    SELECT m.group_id FROM asker a JOIN group_users m ON m.user_id = a.user_id
    UNION
    SELECT e.parent_id FROM around JOIN group_groups e ON e.child_id = around.group_id
),
closed(silo_id) AS (
    SELECT silo_id FROM silos WHERE status <> 'active' OR vetoed_by IS NOT NULL
)
SELECT version, CAST(NULL AS TEXT), CAST(NULL AS TEXT), CAST(NULL AS TEXT), CAST(NULL AS TEXT), CAST(NULL AS TEXT),
       CAST(NULL AS BIGINT), CAST(NULL AS BIGINT), CAST(NULL AS TEXT)
FROM policy_state
UNION ALL
SELECT NULL, g.grant_id, g.user_id, g.group_id, g.silo_id, g.effect, g.not_before, g.expires_at, g.reason
FROM asker a JOIN grants g ON g.user_id = a.user_id
WHERE g.revoked_at IS NULL AND (g.expires_at IS NULL OR g.expires_at > :at) AND g.silo_id NOT IN (SELECT * FROM closed)
UNION ALL
SELECT NULL, g.grant_id, g.user_id, g.group_id, g.silo_id, g.effect, g.not_before, g.expires_at, g.reason
FROM around JOIN grants g ON g.group_id = around.group_id
WHERE g.revoked_at IS NULL AND (g.expires_at IS NULL OR g.expires_at > :at) AND g.silo_id NOT IN (SELECT * FROM closed)
""")
_VERSION: Final = select(PolicyState.version)


def resolve(user_id: str, rules: Iterable[tuple[Any, ...]], at: int, policy_version: int) -> Decision:
    """The decision from the rules (fields of Rule) in reach of an active user: not revoked, of open silos. Pure."""
    allows: dict[str, tuple[Any, ...]] = {}
    denied: set[str] = set()
    boundary: int | None = None
    for rule in rules:
        silo_id, effect, not_before, expires_at = rule[3:7]
        if expires_at is not None and expires_at <= at:
            continue
        change_at = not_before if not_before > at else expires_at
        if change_at is not None and (boundary is None or change_at < boundary):
            boundary = change_at
        if not_before > at:
            continue
        if effect != "allow":
            denied.add(silo_id)
        elif silo_id not in allows or _lasts_longer(rule, allows[silo_id]):
            allows[silo_id] = rule
    silos = tuple(sorted(allows.keys() - denied, key=str.encode))
    reasons = {silo: _reason(allows[silo]) for silo in silos}
    return Decision(user_id, silos, policy_version, reasons, None if boundary is None else from_micros(boundary))


def _lasts_longer(rule: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """The later end counts, no end being the latest; the greater id where both end together."""
    if rule[6] == other[6]:
        return bool(rule[0] > other[0])
    return other[6] is not None and (rule[6] is None or rule[6] > other[6])


def _reason(rule: tuple[Any, ...]) -> Reason:
    grant_id, user_id, group_id, _, _, _, expires_at, reason = rule
    subject = f"group:{group_id}" if user_id is None else f"user:{user_id}"
    return Reason(grant_id, subject, None if expires_at is None else from_micros(expires_at), reason)


def permitted(connection: Connection, user_id: str, at: datetime) -> Decision:
    """The silos `user_id` may use at `at`. Nobody is an error: an unknown, disabled or malformed id gets no silo.

    Raises TimeWithoutZone for a naive `at`.
    """
    instant = to_micros(at, "time of the decision")
    # An id that could never be stored (PostgreSQL refuses NUL) is asked about as the empty id, which nobody has.
    known = user_id if is_valid_id(user_id) else ""
    rows = connection.execute(_RULES_OF_ONE, {"user_id": known, "at": instant}).all()
    versions = [row[0] for row in rows if row[0] is not None]
    if not versions:
        raise SchemaOutdated
    return resolve(user_id, [row[1:] for row in rows if row[0] is None], instant, versions[0])


def permitted_for_all(connection: Connection, at: datetime, silo_id: str | None = None) -> dict[str, Decision]:
    """`permitted` of everybody in reach of any rule, for matrices and previews; all others have no silo.

    With `silo_id` only the rules of that silo count, and the decisions say nothing of other silos.
    """
    instant = to_micros(at, "time of the decision")
    return at_one_version(connection, lambda version: _everybody(connection, instant, silo_id, version))


def _everybody(connection: Connection, at: int, silo_id: str | None, version: int) -> dict[str, Decision]:
    open_silos = select(Silo.silo_id).where(Silo.status == "active", Silo.vetoed_by.is_(None))
    if silo_id is not None:
        open_silos = open_silos.where(Silo.silo_id == silo_id)
    columns = [getattr(Grant, name) for name in Rule._fields]
    grants = select(*columns).where(Grant.revoked_at.is_(None), Grant.silo_id.in_(open_silos))
    of_user: dict[str, list[tuple[Any, ...]]] = {}
    of_group: dict[str, list[tuple[Any, ...]]] = {}
    for row in connection.execute(grants):
        holders = of_group if row[1] is None else of_user
        holders.setdefault(row[2] if row[1] is None else row[1], []).append(tuple(row))
    parents: dict[str, list[str]] = {}
    for child, parent in connection.execute(select(GroupGroup.child_id, GroupGroup.parent_id)):
        parents.setdefault(child, []).append(parent)
    groups: dict[str, list[str]] = {}
    for user, group in connection.execute(select(GroupUser.user_id, GroupUser.group_id)):
        groups.setdefault(user, []).append(group)
    found = {}
    for user in connection.execute(select(User.user_id).where(User.status == "active")).scalars():
        rules = list(of_user.get(user, ()))
        around, todo = set(), groups.get(user, [])[:]
        while todo:
            group = todo.pop()
            if group not in around:
                around.add(group)
                todo += parents.get(group, ())
                rules += of_group.get(group, ())
        if rules:
            found[user] = resolve(user, rules, at, version)
    return found


def at_one_version(connection: Connection, read: Callable[[int], T]) -> T:
    """A reading of several statements, begun anew when the policy changed between them. Raises PolicyBusy."""
    for _ in range(ATTEMPTS):
        version = policy_version(connection)
        found = read(version)
        if policy_version(connection) == version:
            return found
    raise PolicyBusy


def policy_version(connection: Connection) -> int:
    """The number of changes so far. Raises SchemaOutdated where the database has no policy."""
    version: Any = connection.execute(_VERSION).scalar()
    if version is None:
        raise SchemaOutdated
    return int(version)
