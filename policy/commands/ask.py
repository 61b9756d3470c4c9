"""seqr policy check, permitted, explain"""

from __future__ import annotations

import typer

from policy.commands.common import (
    AtOption,
    DatabaseOption,
    JsonOption,
    open_connection,
    parse_instant,
    print_json,
    print_table,
)

DENIED = 3


def check(
    user_id: str, silo_id: str, at: AtOption = None, as_json: JsonOption = False, database: DatabaseOption = ""
) -> None:
    """Whether a user may use a silo; the exit status is 0 for allowed and 3 for denied."""
    from policy import decision

    with open_connection(database) as connection:
        found = decision.permitted(connection, user_id, parse_instant(at))
    allowed = found.allows(silo_id)
    if as_json:
        print_json({"allowed": allowed, "policy_version": found.policy_version})
    else:
        print("allowed" if allowed else "denied")
    if not allowed:
        raise typer.Exit(DENIED)


def permitted(user_id: str, at: AtOption = None, as_json: JsonOption = False, database: DatabaseOption = "") -> None:
    """The silos a user may use, each with the grant it rests on."""
    from policy import decision

    with open_connection(database) as connection:
        found = decision.permitted(connection, user_id, parse_instant(at))
    rows = [
        {
            "silo_id": silo,
            "grant_id": why.grant_id,
            "granted_to": why.subject,
            "expires_at": why.expires_at.isoformat() if why.expires_at else None,
            "reason": why.reason,
        }
        for silo, why in found.reasons.items()
    ]
    if as_json:
        print_json(
            {"user_id": user_id, "silos": list(found.silos), "policy_version": found.policy_version, "why": rows}
        )
    else:
        title = f"Silos {user_id} may use, at policy version {found.policy_version}"
        print_table(title, ("silo_id", "grant_id", "granted_to", "expires_at", "reason"), rows)


def explain(
    user_id: str, silo_id: str, at: AtOption = None, as_json: JsonOption = False, database: DatabaseOption = ""
) -> None:
    """Why a user may or may not use a silo: the deciding path, and the rules that lost."""
    from policy.explain import explain as explain_access

    with open_connection(database) as connection:
        found = explain_access(connection, user_id, silo_id, parse_instant(at))
    applied = [*([found.winning] if found.winning else []), *found.losing]
    if as_json:
        rules = [
            {"grant_id": one.rule.grant_id, "effect": one.rule.effect, "outcome": one.outcome, "path": one.path}
            for one in applied
        ]
        answer = {"allowed": found.allowed, "because": found.because, "path": found.path, "rules": rules}
        print_json({**answer, "policy_version": found.policy_version})
        return
    print("allowed" if found.allowed else "denied")
    print(found.because)
    if applied:
        rows = [
            {
                "outcome": one.outcome,
                "effect": one.rule.effect,
                "path": " -> ".join(one.path),
                "reason": one.rule.reason,
            }
            for one in applied
        ]
        print_table("Rules about this user and silo", ("effect", "outcome", "path", "reason"), rows)
