"""The steps that make a policy say what a file says (see policy.yaml_io.load)."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

from policy import grants, limits, listing, silos, users
from policy.document import GrantEntry, PolicyDocument, SiloEntry
from policy.errors import PolicyFileInvalid
from policy.times import iso, to_micros
from policy.transaction import Change

# From open to closed; a file moves a silo to the right only.
_STATUS_ORDER: Final = {"active": 0, "quarantined": 1, "suspended": 2}
Row = dict[str, Any]


def apply(change: Change, document: PolicyDocument, prune: bool) -> list[str]:
    """Writes the differences and returns notes about what was not done."""
    notes: list[str] = []
    _users(change, document, notes)
    _groups(change, document, prune, notes)
    _silos(change, document, notes)
    _grants(change, document, prune, notes)
    return notes


def _users(change: Change, document: PolicyDocument, notes: list[str]) -> None:
    present = _by("user_id", listing.users(change.connection))
    set_now = _by("subject", listing.limits(change.connection))
    for user_id, entry in document.users.items():
        row = present.get(user_id)
        if row is None:
            users.create_user(
                change, user_id, entry.roles if entry.roles is not None else ("analyst",), entry.display_name
            )
        elif entry.roles is not None and list(entry.roles) != row["roles"]:
            users.set_roles(change, user_id, entry.roles)
        differs = any(set_now.get(f"user:{user_id}", {}).get(n) != v for n, v in entry.limits.given().items())
        if differs:
            limits.set_limits(change, f"user:{user_id}", entry.limits)
        disabled = row is not None and row["status"] == "disabled"
        if entry.disabled and not disabled:
            users.set_user_status(change, user_id, "disabled")
        elif disabled and not entry.disabled:
            notes.append(f"user {user_id} stays disabled; use `user enable`")


def _groups(change: Change, document: PolicyDocument, prune: bool, notes: list[str]) -> None:
    present = _by("group_id", listing.groups(change.connection))
    for group_id, entry in document.groups.items():
        if group_id not in present:
            users.create_group(change, group_id, entry.display_name)
    # Before the additions, so that a file may turn a nesting round without passing through a cycle.
    for group_id, row in present.items():
        wanted = document.groups[group_id].members if group_id in document.groups else ()
        for member in row["members"]:
            if member in wanted:
                continue
            if prune:
                users.remove_member(change, group_id, member)
            else:
                notes.append(f"{member} in group {group_id} is not in the file; --prune removes it")
    for group_id, entry in document.groups.items():
        had = present[group_id]["members"] if group_id in present else []
        for member in dict.fromkeys(entry.members):
            if member not in had:
                users.add_member(change, group_id, member)


def _silos(change: Change, document: PolicyDocument, notes: list[str]) -> None:
    present = _by("silo_id", listing.silos(change.connection))
    for silo_id, entry in document.silos.items():
        row = present.get(silo_id)
        if row is None:
            silos.add_silo(change, silo_id, entry.display_name, entry.status)
        elif _STATUS_ORDER[entry.status] > _STATUS_ORDER[row["status"]]:
            silos.set_silo_status(change, silo_id, entry.status, None)
        elif entry.status != row["status"]:
            notes.append(f"silo {silo_id} stays {row['status']}; use `silo status`")
        _owners_and_veto(change, silo_id, entry, row, notes)


def _owners_and_veto(change: Change, silo_id: str, entry: SiloEntry, row: Row | None, notes: list[str]) -> None:
    for owner in dict.fromkeys(entry.owners):
        if row is None or owner not in row["owners"]:
            silos.add_silo_owner(change, silo_id, owner)
    vetoed_by = row["vetoed_by"] if row is not None else None
    if entry.vetoed_by is not None and vetoed_by is None:
        silos.restore_veto(change, silo_id, entry.vetoed_by, entry.veto_reason or change.reason)
    elif entry.vetoed_by is None and vetoed_by is not None:
        notes.append(f"silo {silo_id} stays vetoed by {vetoed_by}; only an owner lifts it")


def _grants(change: Change, document: PolicyDocument, prune: bool, notes: list[str]) -> None:
    present = listing.grants(change.connection, revoked=True)
    by_id = _by("grant_id", present)
    alike: dict[tuple[str, str], list[Row]] = {}
    for row in present:
        if row["revoked_at"] is None:
            alike.setdefault((row["subject"], row["silo_id"]), []).append(row)
    kept: set[str] = set()
    for number, entry in enumerate(document.grants):
        if entry.id is not None:
            match = by_id.get(entry.id)
        else:
            match = _same_grant(entry, alike.get((entry.subject, entry.silo), []), kept)
        if match is not None:
            _check_unchanged(f"grants[{number}]", entry, match)
            kept.add(match["grant_id"])
            if match["revoked_at"] is not None:
                notes.append(f"{match['grant_id']} was revoked and stays so; give it another id to grant anew")
        elif isinstance(entry.expires_at, datetime) and to_micros(entry.expires_at) <= change.now:
            notes.append(f"grants[{number}] for {entry.subject} on {entry.silo} is over; it was not added")
        else:
            kept.add(_add(change, entry))
    for row in present:
        if row["grant_id"] in kept or row["revoked_at"] is not None:
            continue
        if prune:
            grants.revoke_grant(change, row["grant_id"])
        else:
            notes.append(
                f"{row['grant_id']} ({row['subject']} on {row['silo_id']}) is not in the file; --prune revokes it"
            )


def _add(change: Change, entry: GrantEntry) -> str:
    return grants.add_grant(
        change,
        entry.subject,
        entry.silo,
        entry.effect,
        entry.not_before,
        entry.expires_at,
        grant_id=entry.id,
        reason=entry.reason,
    )


def _same_grant(entry: GrantEntry, alike: list[Row], taken: set[str]) -> Row | None:
    """A running grant that says the same as an entry without id, and is not the match of another entry."""
    return next((row for row in alike if row["grant_id"] not in taken and not _differences(entry, row)), None)


def _differences(entry: GrantEntry, row: Row) -> list[str]:
    wanted: dict[str, str | None] = {"subject": entry.subject, "silo_id": entry.silo, "effect": entry.effect}
    if entry.not_before is not None:
        wanted["not_before"] = iso(to_micros(entry.not_before))
    if entry.expires_at is not None:
        wanted["expires_at"] = None if entry.expires_at == "never" else iso(to_micros(entry.expires_at))
    return [name for name, value in wanted.items() if row[name] != value]


def _check_unchanged(where: str, entry: GrantEntry, row: Row) -> None:
    different = _differences(entry, row)
    if different:
        problem = f"{row['grant_id']} exists with another {different[0]}; revoke it and use a new id"
        raise PolicyFileInvalid(where, problem)


def _by(name: str, rows: list[Row]) -> Mapping[str, Row]:
    return {row[name]: row for row in rows}
