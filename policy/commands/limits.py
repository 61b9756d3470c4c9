"""seqr policy limits …"""

from __future__ import annotations

from typing import Annotated

import typer

from policy.commands.common import (
    ActorOption,
    DatabaseOption,
    JsonOption,
    ReasonOption,
    VersionOption,
    group,
    how,
    open_connection,
    open_store,
    print_json,
    print_table,
    print_version,
)

limits_app = group("How much users and keys may ask of the gateway; what is not set is its own default.")
SubjectArgument = Annotated[str, typer.Argument(help="user:ID or key:ID")]


@limits_app.command("set")
def set_limits(
    subject: SubjectArgument,
    requests_per_minute: Annotated[int | None, typer.Option(help="Requests in any 60 seconds.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Prompt and answer tokens in any 60 seconds.")] = None,
    tokens_per_day: Annotated[int | None, typer.Option(help="Prompt and answer tokens of a day, UTC.")] = None,
    concurrent_requests: Annotated[int | None, typer.Option(help="Requests that wait or run at once.")] = None,
    reason: ReasonOption = "",
    actor: ActorOption = "",
    if_version: VersionOption = None,
    as_json: JsonOption = False,
    database: DatabaseOption = "",
) -> None:
    """Set the limits given and leave the others as they are."""
    from policy.limits import Limits

    limits = Limits(requests_per_minute, tokens_per_minute, tokens_per_day, concurrent_requests)
    with open_store(database) as store:
        version = store.set_limits(subject, limits, **how(actor, reason, if_version))
    print_version(version, as_json, f"The limits of {subject} are set.")


@limits_app.command("clear")
def clear_limits(
    subject: SubjectArgument,
    reason: ReasonOption = "",
    actor: ActorOption = "",
    if_version: VersionOption = None,
    as_json: JsonOption = False,
    database: DatabaseOption = "",
) -> None:
    """Return to the gateway's defaults."""
    with open_store(database) as store:
        version = store.clear_limits(subject, **how(actor, reason, if_version))
    print_version(version, as_json, f"The gateway's defaults count again for {subject}.")


@limits_app.command("list")
def list_limits(as_json: JsonOption = False, database: DatabaseOption = "") -> None:
    """All limits that are set, by subject."""
    from policy import listing
    from policy.limits import NAMES

    with open_connection(database) as connection:
        rows = listing.limits(connection)
    if as_json:
        print_json(rows)
    else:
        print_table("Limits", ("subject", *NAMES), rows)
