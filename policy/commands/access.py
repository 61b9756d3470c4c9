"""seqr policy silo …, grant, revoke, grants"""

from __future__ import annotations

from typing import Annotated

import typer

from policy.commands.common import (
    ActorOption,
    DatabaseOption,
    DryRunOption,
    JsonOption,
    ReasonOption,
    VersionOption,
    group,
    how,
    open_connection,
    open_store,
    parse_end,
    parse_instant,
    print_diff,
    print_json,
    print_outcome,
    print_table,
    print_version,
)

silo_app = group("Silos: their status, their owners, and the owners' veto.")


@silo_app.command("add")
def add_silo(
    silo_id: str,
    display_name: Annotated[str, typer.Option("--name")] = "",
    reason: ReasonOption = "",
    actor: ActorOption = "",
    if_version: VersionOption = None,
    as_json: JsonOption = False,
    database: DatabaseOption = "",
) -> None:
    """Make a silo known to the policy. Nobody may use it before a grant."""
    with open_store(database) as store:
        version = store.add_silo(silo_id, display_name, **how(actor, reason, if_version))
    print_version(version, as_json, f"Silo {silo_id} was added.")


@silo_app.command("list")
def list_silos(as_json: JsonOption = False, database: DatabaseOption = "") -> None:
    """All silos with status, owners and veto."""
    from policy import listing

    with open_connection(database) as connection:
        rows = listing.silos(connection)
    columns = ("silo_id", "display_name", "status", "status_reason", "owners", "vetoed_by")
    if as_json:
        print_json(rows)
    else:
        print_table("Silos", columns, rows)


@silo_app.command("status")
def set_status(
    silo_id: str,
    status: Annotated[str, typer.Argument(help="active, quarantined or suspended")],
    expect: Annotated[str | None, typer.Option("--expect", help="Refuse unless the silo has this status now.")] = None,
    reason: ReasonOption = "",
    actor: ActorOption = "",
    if_version: VersionOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    database: DatabaseOption = "",
) -> None:
    """Set the status; quarantined and suspended take the silo from everybody at once."""
    with open_store(database) as store:
        options = how(actor, reason, if_version)
        outcome = store.set_silo_status(silo_id, status, expected_status=expect, dry_run=dry_run, **options)
    print_outcome(outcome, as_json, f"Silo {silo_id} is {status}.")


@silo_app.command("veto")
def veto(
    silo_id: str,
    lift: Annotated[bool, typer.Option("--lift", help="Take the veto back.")] = False,
    reason: ReasonOption = "",
    actor: ActorOption = "",
    if_version: VersionOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    database: DatabaseOption = "",
) -> None:
    """The owner forbids, for everybody, the use of the own silo; --actor must be an owner."""
    with open_store(database) as store:
        outcome = store.set_silo_veto(silo_id, not lift, dry_run=dry_run, **how(actor, reason, if_version))
    print_outcome(outcome, as_json, f"The veto on silo {silo_id} is {'lifted' if lift else 'set'}.")


@silo_app.command("owner")
def owner(
    silo_id: str,
    user_id: str,
    remove: Annotated[bool, typer.Option("--remove")] = False,
    reason: ReasonOption = "",
    actor: ActorOption = "",
    if_version: VersionOption = None,
    as_json: JsonOption = False,
    database: DatabaseOption = "",
) -> None:
    """Make a user with the role silo_owner an owner of the silo, or no longer one."""
    with open_store(database) as store:
        change_owner = store.remove_silo_owner if remove else store.add_silo_owner
        version = change_owner(silo_id, user_id, **how(actor, reason, if_version))
    print_version(version, as_json, f"{user_id} {'no longer owns' if remove else 'owns'} silo {silo_id}.")


def grant(
    subject: Annotated[str, typer.Argument(help="user:ID or group:ID")],
    silo_id: str,
    deny: Annotated[bool, typer.Option("--deny", help="Forbid instead of allow; a deny beats every allow.")] = False,
    expires: Annotated[
        str | None, typer.Option("--expires", help="30d, 12h, a time with its zone, or never; an allow ends after 90d.")
    ] = None,
    start: Annotated[str | None, typer.Option("--from", help="A time with its zone; by default now.")] = None,
    reason: ReasonOption = "",
    actor: ActorOption = "",
    if_version: VersionOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    database: DatabaseOption = "",
) -> None:
    """Allow a user or a group to use a silo, or deny it."""
    from policy.grants import NewGrant

    effect = "deny" if deny else "allow"
    not_before, end = parse_instant(start) if start is not None else None, parse_end(expires)
    with open_store(database) as store:
        outcome = store.add_grant(
            subject,
            silo_id,
            effect,
            not_before=not_before,
            expires_at=end,
            dry_run=dry_run,
            **how(actor, reason, if_version),
        )
    if isinstance(outcome, NewGrant):
        sentence = f"{outcome.grant_id}: {effect} {subject} on {silo_id}."
        print_version(outcome.policy_version, as_json, sentence, grant_id=outcome.grant_id)
    else:
        print_diff(outcome, as_json)


def revoke(
    grant_id: str,
    reason: ReasonOption = "",
    actor: ActorOption = "",
    if_version: VersionOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    database: DatabaseOption = "",
) -> None:
    """End a grant at once."""
    with open_store(database) as store:
        outcome = store.revoke_grant(grant_id, dry_run=dry_run, **how(actor, reason, if_version))
    print_outcome(outcome, as_json, f"{grant_id} is revoked.")


def grants(
    silo: Annotated[str | None, typer.Option("--silo")] = None,
    revoked: Annotated[bool, typer.Option("--revoked", help="Show revoked grants too.")] = False,
    as_json: JsonOption = False,
    database: DatabaseOption = "",
) -> None:
    """List the grants."""
    from policy import listing

    with open_connection(database) as connection:
        rows = listing.grants(connection, silo_id=silo, revoked=revoked)
    columns = ["grant_id", "effect", "subject", "silo_id", "not_before", "expires_at", "reason", "created_by"]
    if as_json:
        print_json(rows)
    else:
        print_table("Grants", [*columns, "revoked_at"] if revoked else columns, rows)
