"""Changes to grants: who may, or must not, use which silo, from when until when."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import insert, select, update

from policy.errors import EffectUnknown, GrantRevoked, GrantUnknown, TimeInvalid
from policy.ids import check_id, check_reason, parse_subject
from policy.models import EFFECTS, Grant
from policy.silos import require_silo
from policy.times import DEFAULT_LIFETIME, MICROSECOND, Never, iso, to_micros
from policy.transaction import Change
from policy.users import require_group, require_user


@dataclass(frozen=True)
class NewGrant:
    """A grant that was added, and the policy version of that change."""

    grant_id: str
    policy_version: int


def end_of(expires_at: datetime | Never | None, start: int, default: int | None) -> int | None:
    """Microseconds, or None for no end. Raises TimeInvalid for an end that is not after `start`."""
    if expires_at is None:
        return default
    if isinstance(expires_at, str):
        if expires_at != "never":
            raise TimeInvalid("end", expires_at, "a time with its zone, or never")
        return None
    end = to_micros(expires_at, "end")
    if end <= start:
        raise TimeInvalid("end", expires_at.isoformat(), f"a time after the start, {iso(start)}")
    return end


def add_grant(
    change: Change,
    subject: str,
    silo_id: str,
    effect: str,
    not_before: datetime | None,
    expires_at: datetime | Never | None,
    *,
    grant_id: str | None = None,
    reason: str | None = None,
) -> str:
    """An allow ends after 90 days unless said otherwise; a deny does not end, since its end would open access."""
    who = parse_subject(subject)
    if effect not in EFFECTS:
        raise EffectUnknown(effect, EFFECTS)
    if who.kind == "user":
        require_user(change.connection, who.id)
    else:
        require_group(change.connection, who.id)
    require_silo(change.connection, silo_id)
    start = change.now if not_before is None else to_micros(not_before, "start")
    default = max(start, change.now) + DEFAULT_LIFETIME // MICROSECOND if effect == "allow" else None
    end = end_of(expires_at, max(start, change.now), default)
    grant_id = f"grant-{secrets.token_hex(8)}" if grant_id is None else check_id("grant", grant_id)
    row: dict[str, Any] = {
        "grant_id": grant_id,
        "user_id": who.id if who.kind == "user" else None,
        "group_id": who.id if who.kind == "group" else None,
        "silo_id": silo_id,
        "effect": effect,
        "not_before": start,
        "expires_at": end,
        "reason": change.reason if reason is None else check_reason(reason),
        "created_by": change.actor,
        "created_at": change.now,
    }
    change.connection.execute(insert(Grant).values(row))
    change.record(
        "grant.add",
        grant_id=grant_id,
        subject=subject,
        silo_id=silo_id,
        effect=effect,
        not_before=iso(start),
        expires_at=iso(end),
        grant_reason=row["reason"],
    )
    return grant_id


def revoke_grant(change: Change, grant_id: str) -> None:
    query = select(Grant.__table__).where(Grant.grant_id == check_id("grant", grant_id))
    grant = change.connection.execute(query).mappings().first()
    if grant is None:
        raise GrantUnknown(grant_id)
    if grant["revoked_at"] is not None:
        raise GrantRevoked(grant_id)
    change.connection.execute(update(Grant).where(Grant.grant_id == grant_id).values(revoked_at=change.now))
    subject = f"user:{grant['user_id']}" if grant["user_id"] is not None else f"group:{grant['group_id']}"
    change.record("grant.revoke", grant_id=grant_id, subject=subject, silo_id=grant["silo_id"], effect=grant["effect"])
