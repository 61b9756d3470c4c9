"""Reading what is there, for consoles, the command line and export. Plain dictionaries, times as RFC 3339 text."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, select
from sqlalchemy.orm import InstrumentedAttribute

from policy.models import ApiKey, Grant, Group, GroupGroup, GroupUser, Silo, SiloOwner, UsageLimit, User, UserRole
from policy.times import iso

Row = dict[str, Any]


def users(connection: Connection) -> list[Row]:
    roles = _gather(connection, UserRole.user_id, UserRole.role)
    groups = _gather(connection, GroupUser.user_id, GroupUser.group_id)
    return [
        {
            "user_id": row["user_id"],
            "display_name": row["display_name"],
            "status": row["status"],
            "roles": roles.get(row["user_id"], []),
            "groups": groups.get(row["user_id"], []),
            "created_at": iso(row["created_at"]),
        }
        for row in connection.execute(select(User.__table__).order_by(User.user_id)).mappings()
    ]


def groups(connection: Connection) -> list[Row]:
    members = _gather(connection, GroupUser.group_id, GroupUser.user_id)
    nested = _gather(connection, GroupGroup.parent_id, GroupGroup.child_id)
    return [
        {
            "group_id": row["group_id"],
            "display_name": row["display_name"],
            "members": [f"user:{user}" for user in members.get(row["group_id"], [])]
            + [f"group:{group}" for group in nested.get(row["group_id"], [])],
            "created_at": iso(row["created_at"]),
        }
        for row in connection.execute(select(Group.__table__).order_by(Group.group_id)).mappings()
    ]


def silos(connection: Connection) -> list[Row]:
    owners = _gather(connection, SiloOwner.silo_id, SiloOwner.user_id)
    return [
        {
            **{name: row[name] for name in ("silo_id", "display_name", "status", "status_reason")},
            "vetoed_by": row["vetoed_by"],
            "veto_reason": row["veto_reason"],
            "owners": owners.get(row["silo_id"], []),
            "created_at": iso(row["created_at"]),
        }
        for row in connection.execute(select(Silo.__table__).order_by(Silo.silo_id)).mappings()
    ]


def grants(connection: Connection, *, silo_id: str | None = None, revoked: bool = False) -> list[Row]:
    """All grants in the order they were made; revoked ones only when asked for."""
    query = select(Grant.__table__).order_by(Grant.created_at, Grant.grant_id)
    if silo_id is not None:
        query = query.where(Grant.silo_id == silo_id)
    if not revoked:
        query = query.where(Grant.revoked_at.is_(None))
    return [
        {
            "grant_id": row["grant_id"],
            "subject": f"user:{row['user_id']}" if row["user_id"] is not None else f"group:{row['group_id']}",
            "silo_id": row["silo_id"],
            "effect": row["effect"],
            "not_before": iso(row["not_before"]),
            "expires_at": iso(row["expires_at"]),
            "reason": row["reason"],
            "created_by": row["created_by"],
            "created_at": iso(row["created_at"]),
            "revoked_at": iso(row["revoked_at"]),
        }
        for row in connection.execute(query).mappings()
    ]


def keys(connection: Connection) -> list[Row]:
    """Keys without their digests."""
    return [
        {
            "key_id": row["key_id"],
            "user_id": row["user_id"],
            "scopes": row["scopes"].split(),
            "created_at": iso(row["created_at"]),
            "expires_at": iso(row["expires_at"]),
            "revoked_at": iso(row["revoked_at"]),
        }
        for row in connection.execute(select(ApiKey.__table__).order_by(ApiKey.created_at, ApiKey.key_id)).mappings()
    ]


def limits(connection: Connection) -> list[Row]:
    """What is set for users and keys, by subject; None: the gateway's default."""
    return [dict(row) for row in connection.execute(select(UsageLimit.__table__).order_by("subject")).mappings()]


def _gather(
    connection: Connection, key: InstrumentedAttribute[str], value: InstrumentedAttribute[str]
) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for one, other in connection.execute(select(key, value).order_by(key, value)):
        found.setdefault(one, []).append(other)
    return found
