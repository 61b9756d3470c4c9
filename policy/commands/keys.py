"""seqr policy init and key …"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from policy.commands.common import (
    ActorOption,
    DatabaseOption,
    JsonOption,
    PepperOption,
    ReasonOption,
    VersionOption,
    group,
    how,
    open_connection,
    open_store,
    parse_end,
    print_json,
    print_table,
    print_version,
)

key_app = group("API keys: shown once, stored as a keyed hash.")
ExpiresOption = Annotated[
    str | None, typer.Option("--expires", help="30d, 12h, a time with its zone, or never; by default 90d.")
]


def init(
    admin: Annotated[str, typer.Option("--admin", help="The id of the first admin.")] = "admin",
    expires: ExpiresOption = None,
    actor: ActorOption = "",
    as_json: JsonOption = False,
    database: DatabaseOption = "",
    pepper_file: PepperOption = "",
) -> None:
    """Make the schema, the pepper and the first admin, and print the admin's key: once, here."""
    from policy.db import create_engine_for, upgrade
    from policy.errors import DatabaseUrlMissing, PepperMissing
    from policy.setup import initialise

    if not database:
        raise DatabaseUrlMissing
    if not pepper_file:
        raise PepperMissing
    end = parse_end(expires)
    upgrade(database)
    engine = create_engine_for(database)
    try:
        issued = initialise(engine, Path(pepper_file), admin, end, actor=how(actor, "")["actor"])
    finally:
        engine.dispose()
    if as_json:
        print_json(
            {"user_id": admin, "key_id": issued.key_id, "key": issued.secret, "policy_version": issued.policy_version}
        )
    else:
        print(f"The policy is ready, with {admin} as its first admin. Keep this key, it is not shown again:")
        print(issued.secret)


def upgrade_schema(database: DatabaseOption = "") -> None:
    """Bring the database of an older release to this one's schema."""
    from policy.db import upgrade
    from policy.errors import DatabaseUrlMissing

    if not database:
        raise DatabaseUrlMissing
    upgrade(database)
    print("The policy database has the newest schema.")


@key_app.command("create")
def create_key(
    user_id: str,
    scope: Annotated[
        list[str] | None, typer.Option("--scope", help="chat, admin, deletions, audit, gateway, metrics.")
    ] = None,
    expires: ExpiresOption = None,
    reason: ReasonOption = "",
    actor: ActorOption = "",
    if_version: VersionOption = None,
    as_json: JsonOption = False,
    database: DatabaseOption = "",
    pepper_file: PepperOption = "",
) -> None:
    """Make a key for a user and print it, once; without --scope it may chat."""
    end = parse_end(expires)
    with open_store(database, pepper_file) as store:
        issued = store.create_key(user_id, scope or ["chat"], end, **how(actor, reason, if_version))
    _print_issued(issued.key_id, issued.secret, issued.policy_version, as_json)


@key_app.command("rotate")
def rotate_key(
    key_id: str,
    expires: ExpiresOption = None,
    overlap_hours: Annotated[float, typer.Option("--overlap-hours", help="How long the old key still works.")] = 0,
    reason: ReasonOption = "",
    actor: ActorOption = "",
    if_version: VersionOption = None,
    as_json: JsonOption = False,
    database: DatabaseOption = "",
    pepper_file: PepperOption = "",
) -> None:
    """Make a successor with the same scopes and end the old key."""
    end = parse_end(expires)
    with open_store(database, pepper_file) as store:
        options = how(actor, reason, if_version)
        issued = store.rotate_key(key_id, end, timedelta(hours=overlap_hours), **options)
    _print_issued(issued.key_id, issued.secret, issued.policy_version, as_json)


@key_app.command("revoke")
def revoke_key(
    key_id: str,
    reason: ReasonOption = "",
    actor: ActorOption = "",
    if_version: VersionOption = None,
    as_json: JsonOption = False,
    database: DatabaseOption = "",
) -> None:
    """End a key at once."""
    with open_store(database) as store:
        version = store.revoke_key(key_id, **how(actor, reason, if_version))
    print_version(version, as_json, f"{key_id} is revoked.")


@key_app.command("list")
def list_keys(as_json: JsonOption = False, database: DatabaseOption = "") -> None:
    """All keys by id, never their text."""
    from policy import listing

    with open_connection(database) as connection:
        rows = listing.keys(connection)
    if as_json:
        print_json(rows)
    else:
        print_table("Keys", ("key_id", "user_id", "scopes", "created_at", "expires_at", "revoked_at"), rows)


def _print_issued(key_id: str, secret: str, version: int, as_json: bool) -> None:
    if as_json:
        print_json({"key_id": key_id, "key": secret, "policy_version": version})
    else:
        print(f"{key_id} was made. Keep the key, it is not shown again:")
        print(secret)
