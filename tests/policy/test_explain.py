"""Why: the deciding path and the losing rules; the outcome is always that of `permitted`."""

from datetime import timedelta

import pytest

from policy import decision
from policy.explain import explain


@pytest.fixture
def why(engine, clock):
    def ask(user, silo, at=None):
        with engine.connect() as connection:
            found = explain(connection, user, silo, at or clock())
            assert found.allowed == decision.permitted(connection, user, at or clock()).allows(silo)
        return found

    return ask


def outcomes(found):
    applied = [found.winning, *found.losing] if found.winning else found.losing
    return {one.rule.grant_id: one.outcome for one in applied}


def test_the_path_runs_from_the_user_over_groups_to_the_grant(small, why, how):
    small.create_group("team", **how)
    small.add_member("staff", "group:team", **how)
    small.add_member("team", "user:alice", **how)
    grant = small.add_grant("group:staff", "bank", actor="ada", reason="audit season").grant_id
    found = why("alice", "bank")
    assert found.allowed and found.path == ("user:alice", "group:team", "group:staff", grant)
    assert "audit season" in found.because and grant in found.because
    assert found.losing == () and found.policy_version == small.version()


def test_losing_rules_are_listed_with_what_became_of_them(small, why, how, clock):
    day = timedelta(days=1)
    small.add_member("staff", "user:alice", **how)
    allow = small.add_grant("group:staff", "bank", **how).grant_id
    short = small.add_grant("user:alice", "bank", expires_at=clock() + day, **how).grant_id
    later = small.add_grant("user:alice", "bank", not_before=clock() + 9 * day, **how).grant_id
    gone = small.add_grant("user:alice", "bank", **how).grant_id
    small.revoke_grant(gone, **how)
    small.add_grant("user:bob", "bank", **how)
    small.add_grant("user:alice", "clinic", **how)
    expected = {allow: "wins", short: "redundant", later: "not_started", gone: "revoked"}
    assert outcomes(why("alice", "bank")) == expected
    assert outcomes(why("alice", "bank", clock() + 2 * day)) == expected | {short: "expired"}
    deny = small.add_grant("user:alice", "bank", "deny", actor="ada", reason="conflict of interest").grant_id
    found = why("alice", "bank")
    assert not found.allowed and found.path == ("user:alice", deny) and "conflict of interest" in found.because
    assert outcomes(found) == expected | {deny: "wins", allow: "overridden_by_deny", short: "overridden_by_deny"}


def test_no_rule_is_said_to_be_none(small, why):
    found = why("alice", "bank")
    assert (found.allowed, found.path, found.winning, found.losing) == (False, (), None, ())
    assert found.because == "No rule matches, so access is denied."


def test_what_stands_above_the_rules_is_named(small, why, how):
    grant = small.add_grant("user:alice", "bank", **how).grant_id
    small.set_silo_status("bank", "quarantined", actor="ada", reason="request 7")
    found = why("alice", "bank")
    assert outcomes(found) == {grant: "silo_quarantined"} and "request 7" in found.because and found.path == ()
    small.set_silo_status("bank", "active", **how)
    small.create_user("olga", ["silo_owner"], **how)
    small.add_silo_owner("bank", "olga", **how)
    small.set_silo_veto("bank", True, actor="olga", reason="under review")
    found = why("alice", "bank")
    assert outcomes(found) == {grant: "silo_vetoed"} and "olga" in found.because and "under review" in found.because
    small.disable_user("alice", **how)
    assert outcomes(why("alice", "bank")) == {grant: "user_disabled"}


@pytest.mark.parametrize(
    "user, silo", [("zoe", "bank"), ("alice", "nowhere"), ("a\x00", "bank"), ("alice", "\ud800"), ("", "")]
)
def test_who_or_what_is_unknown_is_named(small, why, user, silo):
    found = why(user, silo)
    assert not found.allowed and "no such" in found.because
    assert (found.user_id, found.silo_id) == (user, silo)
