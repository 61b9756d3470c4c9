"""seqr policy audit …, export, load, test"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from policy.commands.common import (
    ActorOption,
    AtOption,
    DatabaseOption,
    DryRunOption,
    JsonOption,
    ReasonOption,
    VersionOption,
    diff_json,
    group,
    how,
    open_connection,
    open_store,
    parse_instant,
    print_diff,
    print_json,
    print_table,
)

audit_app = group("The hash-chained record of every change.")


@audit_app.command("verify")
def verify(
    head: Annotated[
        str, typer.Option("--head", help="SEQ:HASH as `audit head` once printed, or a receipt's hash.")
    ] = "",
    as_json: JsonOption = False,
    database: DatabaseOption = "",
) -> None:
    """Recompute the chain and name the first row that does not fit; truncation shows only against --head."""
    from policy import audit

    shipped = audit.parse_head(head) if head else None
    with open_connection(database) as connection:
        report = audit.verify(connection, shipped)
    if as_json:
        print_json(asdict(report))
    report.require_ok()
    if not as_json:
        end = "they continue the shipped head" if shipped else "whether rows were cut off the end only --head can show"
        print(f"All {report.rows} rows are as they were written; {end}.")


@audit_app.command("head")
def head(as_json: JsonOption = False, database: DatabaseOption = "") -> None:
    """The last row's number and hash: keep it where the database's administrator cannot write."""
    from policy import audit

    with open_connection(database) as connection:
        found = audit.head(connection)
    if as_json:
        print_json(asdict(found))
    else:
        print(f"{found.seq}:{found.hash}")


@audit_app.command("list")
def list_audit(
    after: Annotated[int, typer.Option("--after", help="Only rows with a higher number.")] = 0,
    limit: Annotated[int, typer.Option("--limit")] = 100,
    as_json: JsonOption = False,
    database: DatabaseOption = "",
) -> None:
    """Rows of the log, oldest first."""
    from policy import audit

    with open_connection(database) as connection:
        rows = [asdict(entry) for entry in audit.entries(connection, after, limit)]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        row["detail"] = audit.canonical(row["detail"])
    print_table("Audit rows", ("seq", "at", "actor", "action", "detail", "reason", "policy_version"), rows)


def export(at: AtOption = None, database: DatabaseOption = "") -> None:
    """Print the policy as YAML: no keys, no audit rows."""
    from policy.yaml_io import export as export_policy

    with open_connection(database) as connection:
        print(export_policy(connection, parse_instant(at)), end="")


def load(
    file: Path,
    prune: Annotated[bool, typer.Option("--prune", help="Also take away grants and members not in the file.")] = False,
    reason: ReasonOption = "",
    actor: ActorOption = "",
    if_version: VersionOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    database: DatabaseOption = "",
) -> None:
    """Make the policy say what a file says: all of it, or nothing when a step or one of its tests fails."""
    from policy.document import read
    from policy.yaml_io import load as load_policy

    document = read(file)
    with open_store(database) as store:
        options = how(actor, reason, if_version)
        report = load_policy(store, document, prune=prune, dry_run=dry_run, **options)
    if as_json:
        result = {"dry_run": dry_run, "changes": report.changes, "notes": report.notes, **diff_json(report.diff)}
        print_json({**result, "policy_version": report.policy_version})
        return
    for note in report.notes:
        print(f"note: {note}")
    if dry_run:
        print_diff(report.diff, False)
    else:
        print(f"{report.changes} changes; the policy is at version {report.policy_version}.")


def test(
    file: Path,
    live: Annotated[bool, typer.Option("--live", help="Ask the database instead of the policy in the file.")] = False,
    at: AtOption = None,
    as_json: JsonOption = False,
    database: DatabaseOption = "",
) -> None:
    """Run the assertions of a policy file against the policy in the file, or against the database with --live."""
    from policy.document import read
    from policy.errors import PolicyTestsFailed
    from policy.yaml_io import failures, failures_in_file

    document = read(file)
    if live:
        with open_connection(database) as connection:
            failed = failures(connection, document.tests, parse_instant(at))
    else:
        failed = failures_in_file(document, parse_instant(at) if at else None)
    if as_json:
        shown = [{"test": asdict(one.assertion), "got": one.got} for one in failed]
        print_json({"total": len(document.tests), "failed": shown})
    for one in failed if not as_json else []:
        print(f"{one.assertion.user}: {one.assertion.wanted}, got {', '.join(one.got) or 'no silo'}", file=sys.stderr)
    if failed:
        raise PolicyTestsFailed(len(failed), len(document.tests))
    if not as_json:
        print(f"All {len(document.tests)} assertions hold.")
