"""What the commands share: options, opening the database, and output as tables or JSON."""

from __future__ import annotations

import getpass
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

    from policy.diff import Diff
    from policy.store import PolicyStore
    from policy.times import Never

DatabaseOption = Annotated[
    str, typer.Option("--database", envvar="SEQR_POLICY_DATABASE_URL", help="sqlite:///FILE or postgresql://…")
]
PepperOption = Annotated[
    str, typer.Option("--pepper-file", envvar="SEQR_POLICY_PEPPER_FILE", help="The secret under which keys are hashed.")
]
ActorOption = Annotated[
    str, typer.Option("--actor", envvar="SEQR_POLICY_ACTOR", help="Who makes the change; by default the login name.")
]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why; it is kept in the audit log.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only say who would gain and lose which silo.")]
VersionOption = Annotated[int | None, typer.Option("--if-version", help="Refuse unless the policy is at this version.")]
AtOption = Annotated[str | None, typer.Option("--at", help="A time with its zone; by default now.")]
UNITS: Final = {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}


def group(help_text: str) -> typer.Typer:
    return typer.Typer(help=help_text, no_args_is_help=True, pretty_exceptions_enable=False)


@contextmanager
def open_engine(database: str) -> Iterator[Engine]:
    """An engine for a database that has our schema. Raises DatabaseUrlMissing, SchemaOutdated, DatabaseUnreachable."""
    from policy.db import create_engine_for, require_schema
    from policy.errors import DatabaseUrlMissing
    from policy.transaction import named_database_errors

    if not database:
        raise DatabaseUrlMissing
    engine = create_engine_for(database, create=False)
    try:
        with named_database_errors(), engine.connect() as connection:
            require_schema(connection)
        yield engine
    finally:
        engine.dispose()


@contextmanager
def open_store(database: str, pepper_file: str = "") -> Iterator[PolicyStore]:
    from policy.keys import load_pepper
    from policy.store import PolicyStore

    with open_engine(database) as engine:
        yield PolicyStore(engine, load_pepper(Path(pepper_file)) if pepper_file else None)


@contextmanager
def open_connection(database: str) -> Iterator[Connection]:
    from policy.transaction import named_database_errors

    with open_engine(database) as engine, named_database_errors(), engine.connect() as connection:
        yield connection


def how(actor: str, reason: str, if_version: int | None = None) -> Any:
    return {"actor": actor or f"cli:{getpass.getuser()}", "reason": reason, "expected_version": if_version}


def parse_end(value: str | None) -> datetime | Never | None:
    """30d, 12h, never, or a time with its zone. Raises TimeInvalid, TimeWithoutZone."""
    from policy.times import parse_time, utc_now

    if value is None:
        return None
    if value == "never":
        return "never"
    if value[:-1].isdecimal() and value[-1:] in UNITS and len(value) < 8:
        return utc_now() + int(value[:-1]) * UNITS[value[-1]]
    return parse_time("time", value)


def parse_instant(value: str | None) -> datetime:
    from policy.times import parse_time, utc_now

    return utc_now() if value is None else parse_time("time", value)


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Cells are plain text: ids and reasons that look like markup or escape codes stay what they are."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(row[column])) for column in columns))
    print(f"{title} ({len(rows)})")
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, (list, tuple)):
        return ", ".join(str(one) for one in value) or "-"
    text = str(value)
    # 2026-11-22T17:40:00.000000Z: a person reads minutes.
    return f"{text[:10]} {text[11:16]}Z" if len(text) == 27 and text.endswith("Z") and text[10] == "T" else text


def print_version(version: int, as_json: bool, sentence: str = "Done.", **more: Any) -> None:
    if as_json:
        print_json({"policy_version": version, **more})
    else:
        print(f"{sentence} The policy is at version {version}.")


def print_outcome(outcome: int | Diff, as_json: bool, sentence: str = "Done.") -> None:
    if isinstance(outcome, int):
        print_version(outcome, as_json, sentence)
    else:
        print_diff(outcome, as_json)


def diff_json(diff: Diff) -> dict[str, Any]:
    return {"gains": diff.gains, "losses": diff.losses, "policy_version": diff.policy_version}


def print_diff(diff: Diff, as_json: bool) -> None:
    if as_json:
        print_json({"dry_run": True, **diff_json(diff)})
        return
    print(f"Nothing was changed; the policy is at version {diff.policy_version}.")
    if diff.is_empty:
        print("Nobody would gain or lose a silo.")
        return
    rows = [{"user": user, "change": "gains", "silos": silos} for user, silos in diff.gains.items()]
    rows += [{"user": user, "change": "loses", "silos": silos} for user, silos in diff.losses.items()]
    print_table("Who would gain and lose", ("user", "change", "silos"), rows)
