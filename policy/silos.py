"""Changes to silos: registration, status, owners, and the owner's veto."""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import Connection, delete, insert, select, update

from policy.errors import (
    NotSiloOwner,
    OwnerRoleMissing,
    OwnerUnknown,
    SiloExists,
    SiloStatusChanged,
    SiloUnknown,
    StatusUnknown,
)
from policy.ids import check_id, check_text
from policy.models import SILO_STATUSES, Silo, SiloOwner
from policy.transaction import Change
from policy.users import require_user, roles_of, user_status


class SiloState(NamedTuple):
    status: str
    vetoed_by: str | None


def require_silo(connection: Connection, silo_id: str) -> SiloState:
    """Raises SiloUnknown."""
    query = select(Silo.status, Silo.vetoed_by).where(Silo.silo_id == check_id("silo", silo_id))
    row = connection.execute(query).first()
    if row is None:
        raise SiloUnknown(silo_id)
    return SiloState(row.status, row.vetoed_by)


def add_silo(change: Change, silo_id: str, display_name: str, status: str) -> None:
    if status not in SILO_STATUSES:
        raise StatusUnknown(status, SILO_STATUSES)
    taken = select(Silo.silo_id).where(Silo.silo_id == check_id("silo", silo_id))
    if change.connection.execute(taken).first() is not None:
        raise SiloExists(silo_id)
    row = {"silo_id": silo_id, "display_name": check_text("display name", display_name), "status": status}
    stored = row | {"status_reason": change.reason, "created_at": change.now}
    change.connection.execute(insert(Silo).values(stored))
    change.record("silo.add", **row)


def set_silo_status(change: Change, silo_id: str, status: str, expected_status: str | None) -> None:
    if status not in SILO_STATUSES:
        raise StatusUnknown(status, SILO_STATUSES)
    before = require_silo(change.connection, silo_id).status
    if expected_status is not None and before != expected_status:
        raise SiloStatusChanged(silo_id, before, expected_status)
    values = {"status": status, "status_reason": change.reason}
    change.connection.execute(update(Silo).where(Silo.silo_id == silo_id).values(values))
    change.record("silo.status", silo_id=silo_id, before=before, after=status)


def is_owner(connection: Connection, silo_id: str, user_id: str) -> bool:
    query = select(SiloOwner.user_id).where(SiloOwner.silo_id == silo_id, SiloOwner.user_id == user_id)
    return connection.execute(query).first() is not None


def add_silo_owner(change: Change, silo_id: str, user_id: str) -> None:
    """Adding an owner again changes nothing but is recorded. Raises OwnerRoleMissing without the role silo_owner."""
    require_silo(change.connection, silo_id)
    require_user(change.connection, user_id)
    if "silo_owner" not in roles_of(change.connection, user_id):
        raise OwnerRoleMissing(user_id)
    if not is_owner(change.connection, silo_id, user_id):
        change.connection.execute(insert(SiloOwner).values(silo_id=silo_id, user_id=user_id))
    change.record("silo.add_owner", silo_id=silo_id, user_id=user_id)


def remove_silo_owner(change: Change, silo_id: str, user_id: str) -> None:
    require_silo(change.connection, silo_id)
    if not is_owner(change.connection, silo_id, user_id):
        raise OwnerUnknown(user_id, silo_id)
    one = delete(SiloOwner).where(SiloOwner.silo_id == silo_id, SiloOwner.user_id == user_id)
    change.connection.execute(one)
    change.record("silo.remove_owner", silo_id=silo_id, user_id=user_id)


def set_silo_veto(change: Change, silo_id: str, vetoed: bool) -> None:
    """The actor must be an active owner with the role silo_owner: not even an admin lifts a data owner's veto."""
    require_silo(change.connection, silo_id)
    owner = (
        is_owner(change.connection, silo_id, change.actor)
        and user_status(change.connection, change.actor) == "active"
        and "silo_owner" in roles_of(change.connection, change.actor)
    )
    if not owner:
        raise NotSiloOwner(change.actor, silo_id)
    values = (
        {"vetoed_by": change.actor, "veto_reason": change.reason}
        if vetoed
        else {"vetoed_by": None, "veto_reason": None}
    )
    change.connection.execute(update(Silo).where(Silo.silo_id == silo_id).values(values))
    change.record("silo.veto" if vetoed else "silo.veto_lifted", silo_id=silo_id)


def restore_veto(change: Change, silo_id: str, vetoed_by: str, veto_reason: str) -> None:
    """A veto from an exported policy. Closing needs no owner's word, lifting it again does."""
    require_user(change.connection, vetoed_by)
    values = {"vetoed_by": vetoed_by, "veto_reason": veto_reason}
    change.connection.execute(update(Silo).where(Silo.silo_id == silo_id).values(values))
    change.record("silo.veto", silo_id=silo_id, vetoed_by=vetoed_by)
