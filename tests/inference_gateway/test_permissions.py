"""The policy as the engine's guard sees it: a lost silo or key ends a request for good, an unreadable policy all."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from inference_gateway.permissions import Permissions
from policy.db import create_engine_for, upgrade
from policy.store import PolicyStore

HOW: dict[str, Any] = {"actor": "test", "reason": "a test"}
PEPPER = b"\1" * 32


class Policy:
    """A policy in a file with a clock of its own."""

    def __init__(self, path: Path):
        self.path = path
        upgrade(f"sqlite:///{path}")
        self.engine = create_engine_for(f"sqlite:///{path}")
        self.store = PolicyStore(self.engine, PEPPER)
        self.permissions = Permissions(self.engine, PEPPER, lambda: self.now)
        self.store.create_user("alice", **HOW)
        for silo in ("alpha", "beta"):
            self.store.add_silo(silo, **HOW)
        self.grant = self.store.add_grant("user:alice", "alpha", **HOW).grant_id
        self.now = datetime.now(UTC)
        self.key_id, self.secret = self.store.create_key("alice", ["chat"], "never", **HOW)
        self.caller = self.permissions.authenticate(self.secret)

    def watching(self, *silos: str) -> Any:
        return self.permissions.watching("r", self.caller, self.permissions.decide("alice"), frozenset(silos))

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


def test_a_request_without_silos_is_ended_by_no_grant(policy: Policy) -> None:
    with policy.watching():
        policy.store.revoke_grant(policy.grant, **HOW)
        assert policy.permissions.withdrawn() == {}


@pytest.mark.parametrize("silos", [(), ("alpha",)])
def test_a_revoked_key_ends_its_requests_and_no_others(policy: Policy, silos: tuple[str, ...]) -> None:
    other = policy.permissions.authenticate(policy.store.create_key("alice", ["chat"], **HOW).secret)
    decision = policy.permissions.decide("alice")
    with policy.watching(*silos), policy.permissions.watching("other", other, decision, frozenset(silos)):
        assert policy.permissions.withdrawn() == {}
        policy.store.revoke_key(policy.key_id, **HOW)
        assert {name: failed.code for name, failed in policy.permissions.withdrawn().items()} == {"r": "access_ended"}


def test_a_key_revoked_before_the_silos_were_decided_ends_the_request(policy: Policy) -> None:
    policy.store.revoke_key(policy.key_id, **HOW)
    with policy.watching("alpha"):
        assert policy.lost() == "access_ended"


def test_a_key_that_runs_out_ends_the_request_although_no_version_changed(policy: Policy) -> None:
    _, secret = policy.store.create_key("alice", ["chat"], policy.now + timedelta(hours=1), **HOW)
    policy.caller = policy.permissions.authenticate(secret)
    with policy.watching("alpha"):
        policy.now += timedelta(minutes=59)
        assert policy.lost() is None
        policy.now += timedelta(minutes=1)
        assert policy.lost() == "access_ended"


def test_a_rotated_keys_answers_end_with_its_overlap(policy: Policy) -> None:
    with policy.watching("alpha"):
        assert policy.lost() is None
        policy.store.rotate_key(policy.key_id, overlap=timedelta(hours=2), **HOW)
        assert policy.lost() is None
        policy.now += timedelta(hours=3)
        assert policy.lost() == "access_ended"


def test_a_lost_role_ends_what_was_asked_with_a_key(policy: Policy) -> None:
    with policy.watching("alpha"):
        assert policy.lost() is None
        policy.store.set_roles("alice", ["auditor"], **HOW)
        assert policy.lost() == "access_ended"


def test_a_token_that_expires_ends_its_answers_and_no_others(policy: Policy) -> None:
    policy.caller = replace(policy.permissions.logged_in("alice"), expires_at=policy.now + timedelta(minutes=5))
    later = replace(policy.caller, expires_at=policy.now + timedelta(minutes=10))
    decision = policy.permissions.decide("alice")
    with policy.watching("alpha"), policy.permissions.watching("later", later, decision, frozenset()):
        policy.now += timedelta(minutes=4)
        policy.store.create_user("bob", **HOW)  # the policy is read anew, and says nothing about tokens
        assert policy.lost() is None
        policy.now += timedelta(minutes=1)
        assert {name: why.code for name, why in policy.permissions.withdrawn().items()} == {"r": "access_ended"}
        policy.now += timedelta(minutes=5)
        assert policy.permissions.withdrawn()["later"].code == "access_ended"
        lost = policy.permissions.lost(policy.caller, decision, frozenset())
        assert lost is not None and lost.code == "access_ended"


def test_a_log_out_ends_the_answers_of_its_session_and_no_others(policy: Policy) -> None:
    open_ = {"this browser", "another"}
    permissions = Permissions(policy.engine, PEPPER, lambda: policy.now, open_.__contains__)
    alice, decision = permissions.logged_in("alice"), permissions.decide("alice")
    here, there = replace(alice, login="this browser"), replace(alice, login="another")
    with (
        permissions.watching("here", here, decision, frozenset(["alpha"])),
        permissions.watching("there", there, decision, frozenset()),
    ):
        assert permissions.withdrawn() == {} and permissions.lost(here, decision, frozenset()) is None
        policy.store.create_user("bob", **HOW)  # all are looked at anew
        assert permissions.withdrawn() == {}
        open_.remove("this browser")
        assert {name: failed.code for name, failed in permissions.withdrawn().items()} == {"here": "access_ended"}
        failed = permissions.lost(here, decision, frozenset())
        assert failed is not None and failed.code == "access_ended"
    permissions.close()


@pytest.mark.parametrize("act", ["disable", "role"])
def test_an_answer_to_somebody_who_logged_in_ends_with_the_right_to_ask(policy: Policy, act: str) -> None:
    policy.caller = policy.permissions.logged_in("alice")
    with policy.watching():
        policy.store.revoke_key(policy.key_id, **HOW)
        assert policy.lost() is None
        if act == "disable":
            policy.store.disable_user("alice", **HOW)
        else:
            policy.store.set_roles("alice", [], **HOW)
        assert policy.lost() == "access_ended"


def test_the_engines_guard_does_not_wait_for_callers_who_are_being_looked_up(policy: Policy) -> None:
    looked_up, go_on = threading.Event(), threading.Event()

    def slow(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if "api_keys.prefix =" in statement:
            looked_up.set()
            go_on.wait(30)

    permissions = policy.permissions
    with permissions.watching("r", policy.caller, policy.permissions.decide("alice"), frozenset(["alpha"])):
        event.listen(policy.engine, "before_cursor_execute", slow)
        with ThreadPoolExecutor(2) as threads:
            knocking = threads.submit(permissions.authenticate, policy.secret)
            try:
                assert looked_up.wait(30)
                assert threads.submit(permissions.withdrawn).result(30) == {}
            finally:
                go_on.set()
            assert knocking.result(30).user_id == "alice"


def test_a_finished_request_is_forgotten(policy: Policy) -> None:
    with policy.watching("alpha"):
        policy.store.revoke_grant(policy.grant, **HOW)
    assert policy.permissions.withdrawn() == {}


@pytest.mark.parametrize("silos", [(), ("alpha",)])
def test_an_unreadable_policy_ends_every_request(policy: Policy, silos: tuple[str, ...]) -> None:
    with policy.watching(*silos):
        assert policy.lost() is None
        with policy.engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE policy_state RENAME TO gone")
        assert policy.lost() == "policy_unavailable"


@pytest.mark.parametrize("act", ["revoke", "quarantine", "disable", "time", "key", "unreadable"])
def test_a_written_answer_is_lost_with_the_permission_it_was_written_under(policy: Policy, act: str) -> None:
    decision, alpha = policy.permissions.decide("alice"), frozenset(["alpha"])
    policy.store.create_user("bob", **HOW)
    assert policy.permissions.lost(policy.caller, decision, alpha) is None
    if act == "revoke":
        policy.store.revoke_grant(policy.grant, **HOW)
    elif act == "quarantine":
        policy.store.set_silo_status("alpha", "quarantined", **HOW)
    elif act == "disable":
        policy.store.disable_user("alice", **HOW)
    elif act == "time":
        policy.now += timedelta(days=91)
    elif act == "key":
        policy.store.revoke_key(policy.key_id, **HOW)
    else:
        with policy.engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE policy_state RENAME TO gone")
    lost = policy.permissions.lost(policy.caller, decision, alpha)
    codes = {"unreadable": "policy_unavailable", "key": "access_ended"}
    assert lost is not None and lost.code == codes.get(act, "permission_revoked")
