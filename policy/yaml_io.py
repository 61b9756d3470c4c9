"""Export a policy to a file, load a file into a policy, and run the assertions a file carries.

A file adds and replaces, but never opens what was closed by hand: it lifts no quarantine, suspension or veto, enables
no disabled user and brings back no revoked grant by its id. The commands for these do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from sqlalchemy import Connection

from policy import listing
from policy.db import create_engine_for, upgrade
from policy.decision import permitted, permitted_for_all
from policy.diff import Diff, compare
from policy.document import Assertion, PolicyDocument
from policy.errors import PolicyTestsFailed
from policy.limits import NAMES
from policy.loading import apply
from policy.store import PolicyStore
from policy.times import from_micros, iso, to_micros, utc_now
from policy.transaction import change


@dataclass(frozen=True)
class Failure:
    assertion: Assertion
    got: tuple[str, ...]


@dataclass(frozen=True)
class LoadReport:
    """`changes`: audit rows written; `notes`: what the file asked for and did not get, or what it does not mention."""

    changes: int
    diff: Diff
    notes: tuple[str, ...]
    policy_version: int


def export(connection: Connection, at: datetime) -> str:
    """The policy as YAML: everything but keys and their limits, audit rows, and grants revoked or over at `at`."""
    now = iso(to_micros(at)) or ""
    limits = {row["subject"]: row for row in listing.limits(connection)}
    document = {
        "users": {
            row["user_id"]: _user(row) | _limits(limits.get(f"user:{row['user_id']}"))
            for row in listing.users(connection)
        },
        "groups": {
            row["group_id"]: {"display_name": row["display_name"], "members": row["members"]}
            for row in listing.groups(connection)
        },
        "silos": {row["silo_id"]: _silo(row) for row in listing.silos(connection)},
        "grants": [
            _grant(row) for row in listing.grants(connection) if row["expires_at"] is None or row["expires_at"] > now
        ],
    }
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)


def failures(connection: Connection, tests: Sequence[Assertion], at: datetime) -> list[Failure]:
    """The assertions that do not hold, with what is permitted instead."""
    failed = []
    for test in tests:
        got = permitted(connection, test.user, test.at or at).silos
        holds = (
            (test.permitted is None or set(test.permitted) == set(got))
            and set(test.allowed) <= set(got)
            and not set(test.denied) & set(got)
        )
        if not holds:
            failed.append(Failure(test, got))
    return failed


def failures_in_file(document: PolicyDocument, at: datetime | None) -> list[Failure]:
    """The file's assertions, asked of the file alone, loaded into a passing database.

    Asked at `at`, or right after the loading: a grant without a beginning begins with it.
    """
    with TemporaryDirectory(prefix="seqr-policy-test-") as folder:
        url = f"sqlite:///{folder}/policy.db"
        upgrade(url)
        engine = create_engine_for(url)
        try:
            store = PolicyStore(engine)
            load(store, replace(document, tests=()), actor="policy test", reason="a scratch copy")
            with engine.connect() as connection:
                return failures(connection, document.tests, at or utc_now())
        finally:
            engine.dispose()


def load(
    store: PolicyStore,
    document: PolicyDocument,
    *,
    actor: str,
    reason: str,
    prune: bool = False,
    dry_run: bool = False,
    expected_version: int | None = None,
) -> LoadReport:
    """Makes the policy say what the file says, in one transaction; the file's own tests must hold at its end.

    With `prune`, grants and memberships that the file does not mention are taken away too (users, groups and silos
    stay). Raises PolicyTestsFailed or any error of a single write; then nothing is changed.
    """
    with change(
        store.engine, store.clock, actor=actor, reason=reason, expected_version=expected_version, keep=not dry_run
    ) as tx:
        now = from_micros(tx.now)
        before = permitted_for_all(tx.connection, now)
        notes = apply(tx, document, prune)
        failed = failures(tx.connection, document.tests, now)
        if failed:
            raise PolicyTestsFailed(len(failed), len(document.tests))
        version = tx.version if tx.rows else tx.version - 1
        return LoadReport(
            tx.rows, compare(before, permitted_for_all(tx.connection, now), tx.version - 1), tuple(notes), version
        )


def _user(row: dict[str, Any]) -> dict[str, Any]:
    return {"display_name": row["display_name"], "roles": row["roles"]} | (
        {"disabled": True} if row["status"] == "disabled" else {}
    )


def _limits(row: dict[str, Any] | None) -> dict[str, Any]:
    given = {name: row[name] for name in NAMES if row[name] is not None} if row else {}
    return {"limits": given} if given else {}


def _silo(row: dict[str, Any]) -> dict[str, Any]:
    veto = {name: row[name] for name in ("vetoed_by", "veto_reason") if row[name] is not None}
    return {"display_name": row["display_name"], "status": row["status"], "owners": row["owners"]} | veto


def _grant(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": row["grant_id"],
        "subject": row["subject"],
        "silo": row["silo_id"],
        "effect": row["effect"],
        "not_before": row["not_before"],
        "expires_at": row["expires_at"] or "never",
        "reason": row["reason"],
    }
