"""Every write: named author and reason, one version, one transaction, an audit row; every refusal changes nothing."""

from datetime import datetime, timedelta

import pytest
from sqlalchemy import text

from policy import audit, errors, listing
from policy.diff import Diff


def everything(store):
    """All rows of all tables, to see that nothing moved."""
    with store.engine.connect() as connection:
        tables = (
            "policy_state",
            "users",
            "user_roles",
            "groups",
            "group_users",
            "group_groups",
            "silos",
            "silo_owners",
        )
        rows = {name: connection.execute(text(f"SELECT * FROM {name} ORDER BY 1, 2")).all() for name in tables}
        for name in ("grants", "api_keys", "audit"):
            rows[name] = connection.execute(text(f"SELECT * FROM {name} ORDER BY 1")).all()
    return rows


def refused(store, error, step):
    """The step raises exactly this error, with a code and one sentence, and nothing has moved."""
    before = everything(store)
    with pytest.raises(error) as raised:
        step()
    assert type(raised.value) is error
    assert raised.value.code and str(raised.value).endswith(".") and "\n" not in str(raised.value)
    assert everything(store) == before
    return str(raised.value)


def test_each_write_adds_one_version_and_one_audit_row(store, how):
    writes = [
        ("user.create", lambda: store.create_user("alice", ["analyst", "silo_owner"], "Alice", **how)),
        ("user.roles", lambda: store.set_roles("alice", ["silo_owner", "analyst"], **how)),
        ("user.status", lambda: store.disable_user("alice", **how)),
        ("user.status", lambda: store.enable_user("alice", **how)),
        ("group.create", lambda: store.create_group("staff", "Staff", **how)),
        ("group.add_member", lambda: store.add_member("staff", "user:alice", **how)),
        ("group.remove_member", lambda: store.remove_member("staff", "user:alice", **how)),
        ("silo.add", lambda: store.add_silo("bank", "Bank", **how)),
        ("silo.status", lambda: store.set_silo_status("bank", "quarantined", **how)),
        ("silo.add_owner", lambda: store.add_silo_owner("bank", "alice", **how)),
        ("silo.veto", lambda: store.set_silo_veto("bank", True, actor="alice", reason="test")),
        ("silo.veto_lifted", lambda: store.set_silo_veto("bank", False, actor="alice", reason="test")),
        ("silo.remove_owner", lambda: store.remove_silo_owner("bank", "alice", **how)),
        ("key.create", lambda: store.create_key("alice", ["chat"], **how).policy_version),
    ]
    for number, (action, write) in enumerate(writes, 1):
        assert write() == store.version() == number
        with store.engine.connect() as connection:
            [row] = audit.entries(connection, after=number - 1)
        assert (row.action, row.reason, row.policy_version) == (action, "test", number)
        assert row.actor == ("alice" if "veto" in action else "ada")


def test_a_grant_adds_one_version_and_says_its_content_in_the_audit(small, how, clock):
    before = small.version()
    made = small.add_grant("user:alice", "bank", actor="ada", reason="season")
    grant = made.grant_id
    small.revoke_grant(grant, **how)
    assert small.version() == before + 2 == made.policy_version + 1
    with small.engine.connect() as connection:
        added, revoked = list(audit.entries(connection))[-2:]
    assert added.detail == {
        "grant_id": grant,
        "subject": "user:alice",
        "silo_id": "bank",
        "effect": "allow",
        "not_before": "2026-11-22T12:00:00.000000Z",
        "expires_at": "2027-02-20T12:00:00.000000Z",
        "grant_reason": "season",
    }
    assert revoked.detail["grant_id"] == grant


@pytest.mark.parametrize("silo, subject, error", [
    ("nowhere", "user:alice", errors.SiloUnknown),
    ("Bank", "user:alice", errors.SiloUnknown),
    ("bank", "user:zoe", errors.UserUnknown),
    ("bank", "user:Alice", errors.UserUnknown),
    ("bank", "group:zoo", errors.GroupUnknown),
    ("bank", "group:alice", errors.GroupUnknown),
    ("bank", "alice", errors.SubjectMalformed),
    ("bank", "robot:alice", errors.SubjectMalformed),
    ("bank", "user:", errors.SubjectMalformed),
    ("bank", "user:a b", errors.SubjectMalformed),
    ("", "user:alice", errors.IdInvalid),
    ("ba\x00nk", "user:alice", errors.IdInvalid),
])  # fmt: skip
def test_a_grant_for_an_unknown_silo_or_subject_changes_nothing(small, how, silo, subject, error):
    message = refused(small, error, lambda: small.add_grant(subject, silo, **how))
    if error in (errors.SiloUnknown, errors.UserUnknown, errors.GroupUnknown):
        assert (silo if error is errors.SiloUnknown else subject.partition(":")[2]) in message


def test_a_grant_with_bad_times_or_effect_changes_nothing(small, how, clock):
    def grant(**more):
        return lambda: small.add_grant("user:alice", "bank", **more, **how)

    hour = timedelta(hours=1)
    refused(small, errors.TimeWithoutZone, grant(expires_at=datetime(2030, 1, 1)))
    refused(small, errors.TimeWithoutZone, grant(not_before=datetime(2026, 1, 1)))
    refused(small, errors.TimeInvalid, grant(expires_at=clock() - hour))
    refused(small, errors.TimeInvalid, grant(expires_at=clock()))
    refused(small, errors.TimeInvalid, grant(not_before=clock() + 2 * hour, expires_at=clock() + hour))
    refused(small, errors.TimeInvalid, grant(expires_at="tomorrow"))
    refused(small, errors.TimeInvalid, grant(expires_at=90))
    refused(small, errors.EffectUnknown, grant(effect="Allow"))


@pytest.mark.parametrize("how, error", [
    ({"actor": "", "reason": "r"}, errors.ActorMissing),
    ({"actor": "ada", "reason": ""}, errors.ReasonMissing),
    ({"actor": "ada", "reason": " \n"}, errors.ReasonMissing),
    ({"actor": "ada", "reason": None}, errors.ReasonMissing),
    ({"actor": "ada", "reason": "nul \x00 byte"}, errors.TextInvalid),
    ({"actor": "ada\x1b[31m", "reason": "r"}, errors.TextInvalid),
    ({"actor": "ada", "reason": "\ud800"}, errors.TextInvalid),
    ({"actor": "ada", "reason": "x" * 2001}, errors.TextInvalid),
])  # fmt: skip
def test_a_write_without_author_or_reason_changes_nothing(small, how, error):
    refused(small, error, lambda: small.add_grant("user:alice", "bank", **how))


def test_a_write_against_another_version_changes_nothing(small, how):
    seen = small.version()
    assert small.create_user("carol", expected_version=seen, **how) == seen + 1
    refused(small, errors.VersionMismatch, lambda: small.create_user("dave", expected_version=seen, **how))


def test_what_exists_or_is_gone_is_named(small, how):
    grant = small.add_grant("user:alice", "bank", **how).grant_id
    small.revoke_grant(grant, **how)
    small.add_member("staff", "user:alice", **how)
    key = small.create_key("alice", ["chat"], **how).key_id
    small.revoke_key(key, **how)
    refused(small, errors.UserExists, lambda: small.create_user("alice", **how))
    refused(small, errors.GroupExists, lambda: small.create_group("staff", **how))
    refused(small, errors.SiloExists, lambda: small.add_silo("bank", **how))
    refused(small, errors.MembershipExists, lambda: small.add_member("staff", "user:alice", **how))
    refused(small, errors.MembershipUnknown, lambda: small.remove_member("staff", "user:bob", **how))
    refused(small, errors.GrantRevoked, lambda: small.revoke_grant(grant, **how))
    refused(small, errors.GrantUnknown, lambda: small.revoke_grant("grant-0", **how))
    refused(small, errors.KeyAlreadyRevoked, lambda: small.revoke_key(key, **how))
    refused(small, errors.KeyIdUnknown, lambda: small.revoke_key("key-0", **how))
    refused(small, errors.UserUnknown, lambda: small.disable_user("zoe", **how))
    refused(small, errors.RoleUnknown, lambda: small.create_user("zoe", ["root"], **how))
    refused(small, errors.StatusUnknown, lambda: small.set_silo_status("bank", "vetoed", **how))
    refused(small, errors.SiloUnknown, lambda: small.set_silo_status("Bank", "active", **how))


def test_lifting_a_quarantine_that_became_a_suspension_changes_nothing(small, how):
    small.set_silo_status("bank", "quarantined", **how)
    small.set_silo_status("bank", "suspended", **how)
    lift = {"expected_status": "quarantined", **how}
    refused(small, errors.SiloStatusChanged, lambda: small.set_silo_status("bank", "active", **lift))


def test_only_an_owner_vetoes(small, how):
    for user in ("olga", "otto"):
        small.create_user(user, ["silo_owner"], **how)
    refused(small, errors.OwnerRoleMissing, lambda: small.add_silo_owner("bank", "alice", **how))
    small.add_silo_owner("bank", "olga", **how)
    refused(small, errors.OwnerUnknown, lambda: small.remove_silo_owner("bank", "otto", **how))
    for actor in ("ada", "otto", "alice", "Olga"):
        refused(
            small, errors.NotSiloOwner, lambda actor=actor: small.set_silo_veto("bank", True, actor=actor, reason="r")
        )
    small.set_silo_veto("bank", True, actor="olga", reason="r")
    small.set_roles("olga", ["analyst"], **how)
    refused(small, errors.NotSiloOwner, lambda: small.set_silo_veto("bank", False, actor="olga", reason="r"))


def test_groups_in_a_circle_are_refused(store, how):
    for group in "abc":
        store.create_group(group, **how)
    store.add_member("a", "group:b", **how)
    store.add_member("b", "group:c", **how)
    for parent, child in [("c", "a"), ("b", "a"), ("a", "a")]:
        refused(
            store,
            errors.GroupCycle,
            lambda parent=parent, child=child: store.add_member(parent, f"group:{child}", **how),
        )


@pytest.mark.parametrize("order", ["from above", "from below", "joined in the middle"])
def test_eight_groups_nest_and_nine_do_not(store, silos_of, how, order):
    for level in range(9):
        store.create_group(f"g{level}", **how)
    links = [(f"g{level}", f"group:g{level + 1}") for level in range(8)]
    ordered = {
        "from above": links,
        "from below": links[::-1],
        "joined in the middle": [*links[:3], *links[4:], links[3]],
    }[order]
    for parent, child in ordered[:-1] if order != "joined in the middle" else ordered[:-2]:
        store.add_member(parent, child, **how)
    if order == "joined in the middle":
        store.add_member(*ordered[-1], **how)
        last = ordered[-2]
    else:
        last = ordered[-1]
    message = refused(store, errors.GroupTooDeep, lambda: store.add_member(*last, **how))
    assert "9" in message and "8" in message


def test_eight_levels_reach_the_user(store, silos_of, how):
    store.create_user("alice", **how)
    store.add_silo("bank", **how)
    for level in range(8):
        store.create_group(f"g{level}", **how)
        if level:
            store.add_member(f"g{level - 1}", f"group:g{level}", **how)
    store.add_member("g7", "user:alice", **how)
    store.add_grant("group:g0", "bank", **how)
    assert silos_of("alice") == ("bank",)


def test_a_dry_run_says_who_gains_and_loses_and_changes_nothing(small, how, silos_of, clock):
    small.add_member("staff", "user:alice", **how)
    small.add_grant("user:bob", "bank", **how)
    small.add_grant("user:alice", "clinic", **how)
    before, version = everything(small), small.version()

    def grant(subject, silo, effect="allow", **more):
        return small.add_grant(subject, silo, effect, dry_run=True, **more, **how)

    assert grant("group:staff", "bank") == Diff({"alice": ("bank",)}, {}, version)
    assert grant("user:bob", "bank") == Diff({}, {}, version)
    assert grant("user:bob", "bank", "deny") == Diff({}, {"bob": ("bank",)}, version)
    assert grant("user:bob", "clinic", not_before=clock() + timedelta(days=1)) == Diff(
        {"bob": ("clinic",)}, {}, version
    )
    assert small.disable_user("alice", dry_run=True, **how) == Diff({}, {"alice": ("clinic",)}, version)
    assert small.set_silo_status("bank", "suspended", dry_run=True, **how) == Diff({}, {"bob": ("bank",)}, version)
    assert small.remove_member("staff", "user:alice", dry_run=True, **how).is_empty
    assert everything(small) == before
    refused(small, errors.SiloUnknown, lambda: grant("user:bob", "nowhere"))
    refused(small, errors.VersionMismatch, lambda: grant("user:bob", "bank", expected_version=version - 1))


def test_events_of_other_parts_are_audited_without_a_new_version(small):
    version = small.version()
    seq = small.record_event("coordinator", "deletion.accepted", {"request": "r-1", "n": 3}, "asked by the subject")
    assert small.version() == version
    with small.engine.connect() as connection:
        [row] = audit.entries(connection, after=seq - 1)
        assert audit.verify(connection).ok
    assert (row.action, row.detail, row.policy_version) == ("deletion.accepted", {"request": "r-1", "n": 3}, version)


@pytest.mark.parametrize("detail", [{"x": float("nan")}, {"x": object()}, {"x": {1, 2}}])
def test_an_event_that_is_not_json_is_refused(small, detail):
    refused(small, errors.TextInvalid, lambda: small.record_event("coordinator", "a", detail, "r"))


def test_listings_show_what_was_written(small, how):
    small.add_member("staff", "user:alice", **how)
    grant = small.add_grant("group:staff", "bank", **how).grant_id
    small.revoke_grant(grant, **how)
    with small.engine.connect() as connection:
        assert [row["user_id"] for row in listing.users(connection)] == ["alice", "bob"]
        assert listing.groups(connection)[0]["members"] == ["user:alice"]
        assert listing.grants(connection) == []
        [shown] = listing.grants(connection, silo_id="bank", revoked=True)
    assert (shown["grant_id"], shown["subject"]) == (grant, "group:staff")
