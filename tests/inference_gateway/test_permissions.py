"""The policy as the engine's guard sees it: a lost silo ends a request for good, an unreadable policy ends all."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from inference_gateway.permissions import Permissions
from policy.db import create_engine_for, upgrade
from policy.reader import PolicyReader
from policy.store import PolicyStore

HOW: dict[str, Any] = {"actor": "test", "reason": "a test"}


class Policy:
    """A policy in a file with a clock of its own."""

    def __init__(self, path: Path):
        self.path = path
        upgrade(f"sqlite:///{path}")
        self.engine = create_engine_for(f"sqlite:///{path}")
        self.store = PolicyStore(self.engine)
        self.permissions = Permissions(PolicyReader(self.engine), lambda: self.now)
        self.store.create_user("alice", **HOW)
        for silo in ("alpha", "beta"):
            self.store.add_silo(silo, **HOW)
        self.grant = self.store.add_grant("user:alice", "alpha", **HOW)
        self.now = datetime.now(UTC)

    def watching(self, *silos: str) -> Any:
        return self.permissions.watching("r", self.permissions.decide("alice"), frozenset(silos))

    def lost(self) -> str | None:
        failed = self.permissions.withdrawn().get("r")
        return failed.code if failed else None


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    return Policy(tmp_path / "policy.db")


def test_an_unrelated_change_ends_nothing(policy: Policy) -> None:
    with policy.watching("alpha"):
        policy.store.add_grant("user:alice", "beta", **HOW)
        policy.store.create_user("bob", **HOW)
        assert policy.lost() is None


def test_a_revoked_grant_ends_the_request(policy: Policy) -> None:
    with policy.watching("alpha"):
        assert policy.lost() is None
        policy.store.revoke_grant(policy.grant, **HOW)
        assert policy.lost() == "permission_revoked"


def test_a_silo_granted_again_does_not_bring_the_request_back(policy: Policy) -> None:
    with policy.watching("alpha"):
        policy.store.revoke_grant(policy.grant, **HOW)
        assert policy.lost() == "permission_revoked"
        policy.store.add_grant("user:alice", "alpha", **HOW)
        assert policy.lost() == "permission_revoked"


def test_a_quarantined_silo_ends_the_request(policy: Policy) -> None:
    with policy.watching("alpha"):
        policy.store.set_silo_status("alpha", "quarantined", **HOW)
        assert policy.lost() == "permission_revoked"


def test_a_disabled_user_loses_running_requests(policy: Policy) -> None:
    with policy.watching("alpha"):
        policy.store.disable_user("alice", **HOW)
        assert policy.lost() == "permission_revoked"


def test_a_grant_that_runs_out_ends_the_request_although_no_version_changed(policy: Policy) -> None:
    with policy.watching("alpha"):
        policy.now += timedelta(days=91)
        assert policy.lost() == "permission_revoked"


def test_a_request_without_silos_is_never_ended_by_the_policy(policy: Policy) -> None:
    with policy.watching():
        policy.store.revoke_grant(policy.grant, **HOW)
        policy.store.disable_user("alice", **HOW)
        assert policy.permissions.withdrawn() == {}


def test_a_finished_request_is_forgotten(policy: Policy) -> None:
    with policy.watching("alpha"):
        policy.store.revoke_grant(policy.grant, **HOW)
    assert policy.permissions.withdrawn() == {}


def test_an_unreadable_policy_ends_every_request_that_may_use_a_silo(policy: Policy) -> None:
    with policy.watching("alpha"):
        assert policy.lost() is None
        with policy.engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE policy_state RENAME TO gone")
        assert policy.lost() == "policy_unavailable"


@pytest.mark.parametrize("act", ["revoke", "quarantine", "disable", "time", "unreadable"])
def test_a_written_answer_is_lost_with_the_permission_it_was_written_under(policy: Policy, act: str) -> None:
    decision, alpha = policy.permissions.decide("alice"), frozenset(["alpha"])
    policy.store.create_user("bob", **HOW)
    assert policy.permissions.lost(decision, alpha) is None
    if act == "revoke":
        policy.store.revoke_grant(policy.grant, **HOW)
    elif act == "quarantine":
        policy.store.set_silo_status("alpha", "quarantined", **HOW)
    elif act == "disable":
        policy.store.disable_user("alice", **HOW)
    elif act == "time":
        policy.now += timedelta(days=91)
    else:
        with policy.engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE policy_state RENAME TO gone")
    lost = policy.permissions.lost(decision, alpha)
    assert lost is not None and lost.code == ("policy_unavailable" if act == "unreadable" else "permission_revoked")
    assert policy.permissions.lost(decision, frozenset()) is None
