"""seqr policy user … and group …"""

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
    print_json,
    print_outcome,
    print_table,
    print_version,
)

user_app = group("Who there is.")
group_app = group("Groups of users and of other groups.")
RoleOption = Annotated[
    list[str] | None,
    typer.Option("--role", help="admin, privacy_officer, auditor, analyst, silo_owner or service; repeatable."),
]


@user_app.command("create")
def create_user(
    user_id: str,
    role: RoleOption = None,
    display_name: Annotated[str, typer.Option("--name")] = "",
    reason: ReasonOption = "",
    actor: ActorOption = "",
    if_version: VersionOption = None,
    as_json: JsonOption = False,
    database: DatabaseOption = "",
) -> None:
    """Add a user; without --role an analyst."""
    with open_store(database) as store:
        version = store.create_user(user_id, role or ["analyst"], display_name, **how(actor, reason, if_version))
    print_version(version, as_json, f"User {user_id} was created.")


@user_app.command("list")
def list_users(as_json: JsonOption = False, database: DatabaseOption = "") -> None:
    """All users with roles and direct groups."""
    from policy import listing

    with open_connection(database) as connection:
        rows = listing.users(connection)
    if as_json:
        print_json(rows)
    else:
        print_table("Users", ("user_id", "display_name", "status", "roles", "groups", "created_at"), rows)


@user_app.command("roles")
def set_roles(
    user_id: str,
    role: RoleOption = None,
    reason: ReasonOption = "",
    actor: ActorOption = "",
    if_version: VersionOption = None,
    as_json: JsonOption = False,
    database: DatabaseOption = "",
) -> None:
    """Replace the user's roles by those given; keys lose at once what no role allows any more."""
    with open_store(database) as store:
        version = store.set_roles(user_id, role or [], **how(actor, reason, if_version))
    print_version(version, as_json, f"User {user_id} now has {', '.join(role or []) or 'no role'}.")


@user_app.command("disable")
def disable_user(
    user_id: str,
    reason: ReasonOption = "",
    actor: ActorOption = "",
    if_version: VersionOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    database: DatabaseOption = "",
) -> None:
    """Take every silo and every key from the user at once."""
    with open_store(database) as store:
        outcome = store.disable_user(user_id, dry_run=dry_run, **how(actor, reason, if_version))
    print_outcome(outcome, as_json, f"User {user_id} is disabled.")


@user_app.command("enable")
def enable_user(
    user_id: str,
    reason: ReasonOption = "",
    actor: ActorOption = "",
    if_version: VersionOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    database: DatabaseOption = "",
) -> None:
    """Undo disable: running grants and keys count again."""
    with open_store(database) as store:
        outcome = store.enable_user(user_id, dry_run=dry_run, **how(actor, reason, if_version))
    print_outcome(outcome, as_json, f"User {user_id} is enabled.")


@group_app.command("create")
def create_group(
    group_id: str,
    display_name: Annotated[str, typer.Option("--name")] = "",
    reason: ReasonOption = "",
    actor: ActorOption = "",
    if_version: VersionOption = None,
    as_json: JsonOption = False,
    database: DatabaseOption = "",
) -> None:
    """Add an empty group."""
    with open_store(database) as store:
        version = store.create_group(group_id, display_name, **how(actor, reason, if_version))
    print_version(version, as_json, f"Group {group_id} was created.")


@group_app.command("list")
def list_groups(as_json: JsonOption = False, database: DatabaseOption = "") -> None:
    """All groups with their direct members."""
    from policy import listing

    with open_connection(database) as connection:
        rows = listing.groups(connection)
    if as_json:
        print_json(rows)
    else:
        print_table("Groups", ("group_id", "display_name", "members", "created_at"), rows)


@group_app.command("add")
def add_member(
    group_id: str,
    member: Annotated[str, typer.Argument(help="user:ID or group:ID")],
    reason: ReasonOption = "",
    actor: ActorOption = "",
    if_version: VersionOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    database: DatabaseOption = "",
) -> None:
    """Put a user or a whole group into the group."""
    with open_store(database) as store:
        outcome = store.add_member(group_id, member, dry_run=dry_run, **how(actor, reason, if_version))
    print_outcome(outcome, as_json, f"{member} is now in group {group_id}.")


@group_app.command("remove")
def remove_member(
    group_id: str,
    member: Annotated[str, typer.Argument(help="user:ID or group:ID")],
    reason: ReasonOption = "",
    actor: ActorOption = "",
    if_version: VersionOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    database: DatabaseOption = "",
) -> None:
    """Take a direct member out of the group."""
    with open_store(database) as store:
        outcome = store.remove_member(group_id, member, dry_run=dry_run, **how(actor, reason, if_version))
    print_outcome(outcome, as_json, f"{member} is no longer in group {group_id}.")
