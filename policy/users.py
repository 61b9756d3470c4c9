"""Changes to users, their roles, and groups."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from sqlalchemy import Connection, delete, insert, select, update

from policy.errors import (
    GroupCycle,
    GroupExists,
    GroupTooDeep,
    GroupUnknown,
    MembershipExists,
    MembershipUnknown,
    RoleUnknown,
    UserExists,
    UserUnknown,
)
from policy.ids import Subject, check_id, check_text, parse_subject
from policy.models import ROLES, Group, GroupGroup, GroupUser, User, UserRole
from policy.transaction import Change

MAX_DEPTH: Final = 8


def user_status(connection: Connection, user_id: str) -> str | None:
    return connection.execute(select(User.status).where(User.user_id == user_id)).scalar()


def require_user(connection: Connection, user_id: str) -> str:
    """The user's status. Raises UserUnknown."""
    status = user_status(connection, check_id("user", user_id))
    if status is None:
        raise UserUnknown(user_id)
    return status


def require_group(connection: Connection, group_id: str) -> None:
    found = connection.execute(select(Group.group_id).where(Group.group_id == check_id("group", group_id))).first()
    if found is None:
        raise GroupUnknown(group_id)


def roles_of(connection: Connection, user_id: str) -> frozenset[str]:
    return frozenset(connection.execute(select(UserRole.role).where(UserRole.user_id == user_id)).scalars())


def check_roles(roles: Iterable[str]) -> list[str]:
    wanted = [roles] if isinstance(roles, str) else list(roles)
    for role in wanted:
        if role not in ROLES:
            raise RoleUnknown(role, ROLES)
    return sorted(set(wanted))


def create_user(change: Change, user_id: str, roles: Iterable[str], display_name: str) -> None:
    if user_status(change.connection, check_id("user", user_id)) is not None:
        raise UserExists(user_id)
    names = check_roles(roles)
    row: dict[str, Any] = {"user_id": user_id, "display_name": check_text("display name", display_name)}
    change.connection.execute(insert(User).values(row | {"status": "active", "created_at": change.now}))
    _insert_roles(change, user_id, names)
    change.record("user.create", **row, roles=names)


def set_roles(change: Change, user_id: str, roles: Iterable[str]) -> None:
    require_user(change.connection, user_id)
    names, before = check_roles(roles), sorted(roles_of(change.connection, user_id))
    change.connection.execute(delete(UserRole).where(UserRole.user_id == user_id))
    _insert_roles(change, user_id, names)
    change.record("user.roles", user_id=user_id, before=before, after=names)


def set_user_status(change: Change, user_id: str, status: str) -> None:
    before = require_user(change.connection, user_id)
    change.connection.execute(update(User).where(User.user_id == user_id).values(status=status))
    change.record("user.status", user_id=user_id, before=before, after=status)


def create_group(change: Change, group_id: str, display_name: str) -> None:
    taken = select(Group.group_id).where(Group.group_id == check_id("group", group_id))
    if change.connection.execute(taken).first() is not None:
        raise GroupExists(group_id)
    row = {"group_id": group_id, "display_name": check_text("display name", display_name)}
    change.connection.execute(insert(Group).values(row | {"created_at": change.now}))
    change.record("group.create", **row)


def add_member(change: Change, group_id: str, member: str) -> None:
    """`member` is user:ID or group:ID. Raises GroupCycle, and GroupTooDeep beyond 8 groups on one path."""
    subject = parse_subject(member)
    require_group(change.connection, group_id)
    if subject.kind == "user":
        require_user(change.connection, subject.id)
    else:
        require_group(change.connection, subject.id)
    if _edge_exists(change.connection, group_id, subject):
        raise MembershipExists(group_id, member)
    if subject.kind == "user":
        change.connection.execute(insert(GroupUser).values(user_id=subject.id, group_id=group_id))
    else:
        _check_nesting(change.connection, subject.id, group_id)
        change.connection.execute(insert(GroupGroup).values(child_id=subject.id, parent_id=group_id))
    change.record("group.add_member", group_id=group_id, member=member)


def remove_member(change: Change, group_id: str, member: str) -> None:
    subject = parse_subject(member)
    require_group(change.connection, group_id)
    if not _edge_exists(change.connection, group_id, subject):
        raise MembershipUnknown(group_id, member)
    if subject.kind == "user":
        removed = delete(GroupUser).where(GroupUser.user_id == subject.id, GroupUser.group_id == group_id)
        change.connection.execute(removed)
    else:
        nested = delete(GroupGroup).where(GroupGroup.child_id == subject.id, GroupGroup.parent_id == group_id)
        change.connection.execute(nested)
    change.record("group.remove_member", group_id=group_id, member=member)


def _insert_roles(change: Change, user_id: str, roles: list[str]) -> None:
    for role in roles:
        change.connection.execute(insert(UserRole).values(user_id=user_id, role=role))


def _edge_exists(connection: Connection, group_id: str, subject: Subject) -> bool:
    if subject.kind == "user":
        users = select(GroupUser.user_id).where(GroupUser.user_id == subject.id, GroupUser.group_id == group_id)
        return connection.execute(users).first() is not None
    groups = select(GroupGroup.child_id).where(GroupGroup.child_id == subject.id, GroupGroup.parent_id == group_id)
    return connection.execute(groups).first() is not None


def _check_nesting(connection: Connection, child: str, parent: str) -> None:
    parents: dict[str, list[str]] = {}
    children: dict[str, list[str]] = {}
    for lower, upper in connection.execute(select(GroupGroup.child_id, GroupGroup.parent_id)):
        parents.setdefault(lower, []).append(upper)
        children.setdefault(upper, []).append(lower)
    above, below = _levels(parents, parent), _levels(children, child)
    if child in above:
        raise GroupCycle(parent, child)
    depth = max(above.values()) + max(below.values())
    if depth > MAX_DEPTH:
        raise GroupTooDeep(parent, child, depth, MAX_DEPTH)


def _levels(edges: dict[str, list[str]], start: str) -> dict[str, int]:
    """For every group in reach of `start`, the number of groups on the longest path to it, both ends counted."""
    levels, frontier = {start: 1}, [start]
    while frontier:
        reached = {upper: levels[group] + 1 for group in frontier for upper in edges.get(group, ())}
        frontier = [group for group, level in reached.items() if level > levels.get(group, 0)]
        levels.update((group, reached[group]) for group in frontier)
    return levels
