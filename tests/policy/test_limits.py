"""Limits of users and keys: set one number at a time, kept through rotation and export, and every mistake named."""

import pytest
import yaml

from policy import document, errors, listing, yaml_io
from policy.db import create_engine_for, migrate
from policy.limits import Limits
from policy.reader import PolicyReader
from policy.store import PolicyStore


@pytest.fixture
def limits(engine):
    """limits(user, key): what is set for both."""
    with PolicyReader(engine) as reader:
        yield reader.limits


def test_a_number_is_set_changed_and_cleared_and_the_others_stay(small, limits, how):
    version = small.version()
    small.set_limits("user:alice", Limits(requests_per_minute=10, tokens_per_day=5000), **how)
    assert small.set_limits("user:alice", Limits(requests_per_minute=20), **how) == version + 2
    assert limits("alice", "key-none")[0] == Limits(requests_per_minute=20, tokens_per_day=5000)
    assert limits("bob", "key-none") == (Limits(), Limits())
    small.clear_limits("user:alice", **how)
    assert limits("alice", "key-none")[0] == Limits()


def test_a_key_has_limits_beside_its_users(small, limits, how):
    key_id, _ = small.create_key("alice", ["chat"], **how)
    small.set_limits(f"key:{key_id}", Limits(concurrent_requests=2), **how)
    small.set_limits("user:alice", Limits(concurrent_requests=5), **how)
    assert limits("alice", key_id) == (Limits(concurrent_requests=5), Limits(concurrent_requests=2))


def test_a_rotated_key_keeps_its_limits(small, limits, how):
    key_id, _ = small.create_key("alice", ["chat"], **how)
    small.set_limits(f"key:{key_id}", Limits(tokens_per_minute=70), **how)
    successor = small.rotate_key(key_id, **how).key_id
    assert limits("alice", successor)[1] == Limits(tokens_per_minute=70)


def test_what_is_not_set_falls_back_to_the_default():
    default = Limits(requests_per_minute=10, concurrent_requests=3)
    assert Limits(requests_per_minute=99).over(default) == Limits(requests_per_minute=99, concurrent_requests=3)


@pytest.mark.parametrize("value", [0, -1, 2**53 + 1, True, 1.5, "7"])
def test_a_limit_that_is_no_positive_number_is_refused_by_name(small, how, value):
    with pytest.raises(errors.LimitInvalid, match="tokens_per_day is ") as refused:
        small.set_limits("user:alice", Limits(tokens_per_day=value), **how)
    assert "whole number from 1 to" in str(refused.value)


def test_mistakes_about_the_subject_are_named(small, how):
    some = Limits(requests_per_minute=1)
    for subject, error in [
        ("alice", errors.LimitSubjectMalformed),
        ("group:staff", errors.LimitSubjectMalformed),
        ("user:", errors.LimitSubjectMalformed),
        ("user:nobody", errors.UserUnknown),
        ("key:nothing", errors.KeyIdUnknown),
    ]:
        with pytest.raises(error):
            small.set_limits(subject, some, **how)
    with pytest.raises(errors.NoLimitGiven, match="requests_per_minute"):
        small.set_limits("user:alice", Limits(), **how)
    with pytest.raises(errors.LimitsNotSet, match="defaults count"):
        small.clear_limits("user:alice", **how)


def test_a_change_of_limits_is_in_the_audit_with_what_was_before(small, engine, how):
    small.set_limits("user:alice", Limits(tokens_per_day=5), **how)
    small.set_limits("user:alice", Limits(tokens_per_day=6), **how)
    small.clear_limits("user:alice", **how)
    with engine.connect() as connection:
        rows = connection.exec_driver_sql("SELECT action, detail FROM audit ORDER BY seq DESC LIMIT 2").all()
    assert [row[0] for row in rows] == ["limits.clear", "limits.set"]
    assert '"before":{"tokens_per_day":5}' in rows[1][1] and '"given":{"tokens_per_day":6}' in rows[1][1]


def test_users_limits_export_and_load(small, engine, clock, limits, how):
    small.set_limits("user:alice", Limits(requests_per_minute=7), **how)
    with engine.connect() as connection:
        text = yaml_io.export(connection, clock())
    assert yaml.safe_load(text)["users"]["alice"]["limits"] == {"requests_per_minute": 7}
    assert yaml_io.load(small, document.parse(text), **how).changes == 0
    changed = text.replace("requests_per_minute: 7", "requests_per_minute: 8")
    assert yaml_io.load(small, document.parse(changed), **how).changes == 1
    assert limits("alice", "")[0] == Limits(requests_per_minute=8)


@pytest.mark.parametrize(
    ("limits_text", "problem"),
    [("{requests: 1}", "'requests' is not known there"), ("{tokens_per_day: 0}", "from 1 to"), ("7", "must hold")],
)
def test_wrong_limits_in_a_file_are_named_with_their_place(limits_text, problem):
    with pytest.raises(errors.PolicyFileInvalid, match=problem) as refused:
        document.parse(f"users: {{alice: {{limits: {limits_text}}}}}")
    assert "users.alice.limits" in str(refused.value)


def test_the_list_shows_what_is_set(small, engine, how):
    small.set_limits("user:alice", Limits(requests_per_minute=7), **how)
    with engine.connect() as connection:
        rows = listing.limits(connection)
    assert [(row["subject"], row["requests_per_minute"], row["tokens_per_day"]) for row in rows] == [
        ("user:alice", 7, None)
    ]


def test_a_database_of_an_older_release_is_named(empty_url):
    engine = create_engine_for(empty_url)
    migrate(engine, "0001")
    with PolicyReader(engine) as reader, pytest.raises(errors.SchemaOutdated):
        reader.limits("alice", "key")
    engine.dispose()


def test_going_back_to_the_older_schema_drops_limits_and_nothing_else(empty_url, how, downgrade):
    engine = create_engine_for(empty_url)
    migrate(engine, "head")
    store = PolicyStore(engine)
    store.create_user("alice", **how)
    store.set_limits("user:alice", Limits(tokens_per_day=1), **how)
    downgrade(engine, "0001")
    migrate(engine, "head")
    with engine.connect() as connection:
        assert listing.limits(connection) == [] and len(listing.users(connection)) == 1
    engine.dispose()
