"""Who may use which silo: the four sentences of docs/policy.md, and their edges."""

from datetime import UTC, datetime, timedelta, timezone

import pytest

from policy import decision
from policy.errors import TimeWithoutZone


def test_if_no_rule_matches_access_is_denied(small, silos_of):
    assert silos_of("alice") == ()
    assert silos_of("nobody-like-this") == ()


def test_a_grant_to_the_user_allows(small, silos_of, how):
    small.add_grant("user:alice", "bank", **how)
    assert silos_of("alice") == ("bank",)
    assert silos_of("bob") == ()


def test_a_grant_to_a_group_allows_its_members_and_theirs(small, silos_of, how):
    small.create_group("team", **how)
    small.add_member("staff", "group:team", **how)
    small.add_member("team", "user:alice", **how)
    small.add_grant("group:staff", "bank", **how)
    small.add_grant("group:team", "clinic", **how)
    assert silos_of("alice") == ("bank", "clinic")
    small.add_member("staff", "user:bob", **how)
    assert silos_of("bob") == ("bank",)
    small.remove_member("staff", "group:team", **how)
    assert silos_of("alice") == ("clinic",)


@pytest.mark.parametrize("denied, allowed", [("user:alice", "group:staff"), ("group:staff", "user:alice")])
def test_deny_beats_allow_wherever_either_stands(small, silos_of, how, denied, allowed):
    small.add_member("staff", "user:alice", **how)
    small.add_grant(allowed, "bank", **how)
    deny = small.add_grant(denied, "bank", "deny", **how).grant_id
    assert silos_of("alice") == ()
    small.revoke_grant(deny, **how)
    assert silos_of("alice") == ("bank",)


def test_a_deny_whose_time_is_over_denies_no_more(small, silos_of, how, clock):
    small.add_grant("user:alice", "bank", **how)
    small.add_grant("user:alice", "bank", "deny", expires_at=clock() + timedelta(hours=1), **how)
    assert silos_of("alice") == ()
    assert silos_of("alice", clock() + timedelta(hours=1)) == ("bank",)


def test_a_grant_counts_from_its_start_until_before_its_end(small, silos_of, how, clock):
    start, end = clock() + timedelta(hours=1), clock() + timedelta(hours=2)
    small.add_grant("user:alice", "bank", not_before=start, expires_at=end, **how)
    tick = timedelta(microseconds=1)
    assert [silos_of("alice", at) for at in (start - tick, start, end - tick, end)] == [(), ("bank",), ("bank",), ()]


def test_an_allow_ends_after_90_days_unless_never_is_said(small, silos_of, how, clock):
    small.add_grant("user:alice", "bank", **how)
    small.add_grant("user:alice", "clinic", expires_at="never", **how)
    assert silos_of("alice", clock() + timedelta(days=89, hours=23)) == ("bank", "clinic")
    assert silos_of("alice", clock() + timedelta(days=90)) == ("clinic",)


def test_a_deny_does_not_end_by_itself(small, silos_of, how, clock):
    small.add_grant("user:alice", "bank", expires_at="never", **how)
    small.add_grant("user:alice", "bank", "deny", **how)
    assert silos_of("alice", clock() + timedelta(days=3650)) == ()


def test_a_disabled_user_has_no_silo(small, silos_of, how):
    small.add_grant("user:alice", "bank", **how)
    small.disable_user("alice", **how)
    assert silos_of("alice") == ()
    small.enable_user("alice", **how)
    assert silos_of("alice") == ("bank",)


@pytest.mark.parametrize("status", ["quarantined", "suspended"])
def test_a_silo_that_is_not_active_is_nobodys(small, silos_of, how, status):
    for user in ("alice", "bob"):
        small.add_grant(f"user:{user}", "bank", **how)
    small.set_silo_status("bank", status, **how)
    assert silos_of("alice") == silos_of("bob") == ()
    small.set_silo_status("bank", "active", **how)
    assert silos_of("alice") == ("bank",)


def test_lifting_a_quarantine_does_not_lift_the_owners_veto(small, silos_of, how):
    small.create_user("olga", ["silo_owner"], **how)
    small.add_silo_owner("bank", "olga", **how)
    small.add_grant("user:alice", "bank", **how)
    small.set_silo_veto("bank", True, actor="olga", reason="data under review")
    small.set_silo_status("bank", "quarantined", **how)
    small.set_silo_status("bank", "active", **how)
    assert silos_of("alice") == ()
    small.set_silo_veto("bank", False, actor="olga", reason="reviewed")
    assert silos_of("alice") == ("bank",)


# One letter in two cases, composed and decomposed, a look-alike from another script, a ligature, and trailing marks.
TWINS = [
    "alice",
    "Alice",
    "ALICE",
    "é",
    "e\u0301",
    "\u0430lice",
    "ﬁ",
    "fi",
    "ß",
    "ss",
    "ı",
    "i",
    "a.b",
    "a-b",
    "ab",
    "%",
    "_",
]


def test_ids_compare_byte_by_byte(store, silos_of, how):
    store.add_silo("bank", **how)
    for twin in TWINS:
        store.create_user(twin, **how)
        store.add_silo(f"silo-{twin}", **how)
    for twin in TWINS:
        store.add_grant(f"user:{twin}", f"silo-{twin}", **how)
    for twin in TWINS:
        assert silos_of(twin) == (f"silo-{twin}",)
        assert silos_of(twin + " ") == ()


def test_silos_come_sorted_by_bytes(store, silos_of, how):
    store.create_user("alice", **how)
    names = ["b", "B", "a", "Z", "ä", "z", "10", "9", "é", "e\u0301", "\U0001f600", "\uffdc"]
    for name in names:
        store.add_silo(name, **how)
        store.add_grant("user:alice", name, **how)
    assert list(silos_of("alice")) == sorted(names, key=str.encode)


@pytest.mark.parametrize("user", ["", "a\x00b", "\ud800", "x" * 5000, "' OR 1=1 --", "alice\n"])
def test_an_id_nobody_can_have_has_no_silo(small, silos_of, how, user):
    small.add_grant("user:alice", "bank", **how)
    assert silos_of(user) == ()


def test_a_time_without_zone_is_refused(small, engine):
    with engine.connect() as connection, pytest.raises(TimeWithoutZone):
        decision.permitted(connection, "alice", datetime(2026, 1, 1))


def test_the_zone_of_the_question_does_not_matter(small, silos_of, how, clock):
    small.add_grant("user:alice", "bank", expires_at=clock() + timedelta(hours=1), **how)
    tokyo, end = timezone(timedelta(hours=9)), clock() + timedelta(hours=1)
    assert silos_of("alice", end.astimezone(tokyo)) == ()
    assert silos_of("alice", (end - timedelta(seconds=1)).astimezone(tokyo)) == ("bank",)


def test_a_decision_gives_version_and_the_grant_it_rests_on(small, engine, how, clock):
    small.add_member("staff", "user:alice", **how)
    small.add_grant("group:staff", "bank", expires_at=clock() + timedelta(days=1), **how)
    longer = small.add_grant(
        "group:staff", "bank", expires_at=clock() + timedelta(days=9), actor="ada", reason="season"
    ).grant_id
    with engine.connect() as connection:
        found = decision.permitted(connection, "alice", clock())
        assert found.policy_version == decision.policy_version(connection) == small.version()
    assert found.user_id == "alice" and set(found.reasons) == {"bank"}
    why = found.reasons["bank"]
    assert (why.grant_id, why.subject, why.reason) == (longer, "group:staff", "season")
    assert why.expires_at == clock() + timedelta(days=9)


def test_a_decision_says_until_when_it_holds(small, engine, how, clock):
    """The version does not move when a grant runs out or begins, so the decision carries the next such moment."""
    small.add_grant("user:alice", "bank", expires_at=clock() + timedelta(hours=2), **how)
    small.add_grant("user:alice", "clinic", not_before=clock() + timedelta(hours=1), **how)
    small.add_grant("user:bob", "clinic", expires_at=clock() + timedelta(minutes=1), **how)
    with engine.connect() as connection:
        for hours, until in [(0, 1), (1, 2)]:
            at = clock() + timedelta(hours=hours)
            found = decision.permitted(connection, "alice", at)
            assert found.valid_until == clock() + timedelta(hours=until)
            assert found.still_holds(found.policy_version, at)
            assert not found.still_holds(found.policy_version, found.valid_until)
            assert not found.still_holds(found.policy_version + 1, at)
        assert decision.permitted(connection, "nobody", clock()).valid_until is None


def test_check_says_what_the_list_says(small, engine, how, clock):
    small.add_grant("user:alice", "bank", **how)
    with engine.connect() as connection:
        found = decision.permitted(connection, "alice", clock())
    answers = {silo: found.allows(silo) for silo in ("bank", "clinic", "nowhere", "")}
    assert answers == {"bank": True, "clinic": False, "nowhere": False, "": False}


def test_far_times_are_no_error(small, silos_of, how):
    small.add_grant("user:alice", "bank", expires_at="never", **how)
    assert silos_of("alice", datetime.max.replace(tzinfo=UTC)) == ("bank",)
    assert silos_of("alice", datetime.min.replace(tzinfo=UTC)) == ()
