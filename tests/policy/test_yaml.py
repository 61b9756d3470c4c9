"""Policies as files: out and in again, all or nothing, with their own assertions; a file never opens what is closed."""

from datetime import timedelta

import pytest

from policy import audit, decision
from policy.db import create_engine_for
from policy.document import parse, read
from policy.errors import GroupCycle, PolicyFileInvalid, PolicyTestsFailed, SiloUnknown, VersionMismatch
from policy.store import PolicyStore
from policy.times import utc_now
from policy.yaml_io import export, failures, failures_in_file, load

POLICY = """
users:
  alice: {roles: [analyst], display_name: Älice}
  bob: {}
  olga: {roles: [silo_owner]}
  zed: {disabled: true}
groups:
  staff: {members: ["group:team"]}
  team: {members: ["user:alice", "user:zed"]}
silos:
  bank: {display_name: The bank, owners: [olga]}
  clinic: {status: suspended}
grants:
  - {subject: "group:staff", silo: bank, reason: audit season}
  - {subject: "user:bob", silo: bank, effect: deny}
  - {subject: "user:bob", silo: clinic, expires_at: never}
  - {subject: "user:alice", silo: clinic, not_before: 2026-11-01T00:00:00Z, expires_at: 2027-01-01T00:00:00+01:00}
tests:
  - {user: alice, permitted: [bank]}
  - {user: alice, at: 2020-01-01T00:00:00Z, permitted: []}
  - {user: bob, denied: [bank, clinic]}
  - {user: alice, allowed: [bank], denied: [clinic]}
"""


def test_a_file_becomes_the_policy_in_one_version(store, silos_of, how):
    report = load(store, parse(POLICY), **how)
    assert report.policy_version == store.version() == 1
    assert report.diff.gains == {"alice": ("bank",)} and not report.diff.losses and not report.notes
    assert (silos_of("alice"), silos_of("bob"), silos_of("zed")) == (("bank",), (), ())
    with store.engine.connect() as connection:
        assert audit.verify(connection).rows == report.changes
        assert decision.permitted(connection, "alice", store.clock()).reasons["bank"].reason == "audit season"


def test_the_same_file_again_changes_nothing(store, how):
    load(store, parse(POLICY), **how)
    report = load(store, parse(POLICY), **how)
    assert (report.changes, report.notes, store.version()) == (0, (), 1)


def test_an_export_makes_the_same_policy_elsewhere(store, new_database, how, clock):
    load(store, parse(POLICY), **how)
    store.set_silo_veto("bank", True, actor="olga", reason="under review")
    other = PolicyStore(create_engine_for(new_database()), clock=clock)
    with store.engine.connect() as connection:
        exported = export(connection, clock())
        expected = decision.permitted_for_all(connection, clock())
    assert "Älice" in exported
    load(other, parse(exported), **how)
    with other.engine.connect() as connection:
        assert export(connection, clock()) == exported
        found = decision.permitted_for_all(connection, clock())
    assert {user: one.silos for user, one in found.items()} == {user: one.silos for user, one in expected.items()}
    other.engine.dispose()


@pytest.mark.parametrize("broken, error", [
    ("grants: [{subject: 'user:alice', silo: nowhere}]", SiloUnknown),
    ("groups: {team: {members: ['group:staff']}}", GroupCycle),
    ("tests: [{user: alice, permitted: []}]", PolicyTestsFailed),
])  # fmt: skip
def test_a_file_that_fails_at_any_step_changes_nothing(store, how, broken, error):
    load(store, parse(POLICY), **how)
    with pytest.raises(error):
        load(store, parse("users: {carol: {}}\nsilos: {extra: {}}\n" + broken), **how)
    assert store.version() == 1
    with store.engine.connect() as connection:
        assert "carol" not in export(connection, store.clock())


def test_a_stale_or_dry_load_changes_nothing(store, how, clock):
    load(store, parse(POLICY), **how)
    with pytest.raises(VersionMismatch):
        load(store, parse("users: {carol: {}}"), expected_version=0, **how)
    more = parse("grants: [{subject: 'user:bob', silo: bank}, {subject: 'user:olga', silo: bank}]")
    assert load(store, more, dry_run=True, **how).diff.gains == {"olga": ("bank",)}
    assert store.version() == 1


def test_pruning_takes_away_what_the_file_does_not_mention(store, silos_of, how):
    load(store, parse(POLICY), **how)
    store.add_grant("user:olga", "bank", **how)
    store.add_member("team", "user:olga", **how)
    kept = load(store, parse(POLICY), **how)
    assert kept.changes == 0 and len(kept.notes) == 2 and all("--prune" in note for note in kept.notes)
    pruned = load(store, parse(POLICY), prune=True, **how)
    assert pruned.changes == 2 and pruned.diff.losses == {"olga": ("bank",)}
    assert (silos_of("olga"), silos_of("alice")) == ((), ("bank",))


def test_a_file_never_opens_what_was_closed_by_hand(store, silos_of, how, clock):
    load(store, parse(POLICY), **how)
    with store.engine.connect() as connection:
        exported = parse(export(connection, clock()))
    store.set_silo_status("bank", "quarantined", **how)
    store.set_silo_veto("bank", True, actor="olga", reason="under review")
    store.disable_user("alice", **how)
    [grant] = [entry.id for entry in exported.grants if entry.subject == "user:bob" and entry.silo == "clinic"]
    store.revoke_grant(grant, **how)
    report = load(store, exported, **how)
    assert report.changes == 0 and len(report.notes) == 4
    assert silos_of("alice") == ()


def test_a_file_closes(store, silos_of, how):
    load(store, parse(POLICY), **how)
    closing = "users: {alice: {disabled: true}}\nsilos: {bank: {status: quarantined, vetoed_by: olga, veto_reason: r}}"
    assert load(store, parse(closing), **how).diff.losses == {"alice": ("bank",)}


def test_a_grant_that_is_over_is_not_added(store, how):
    over = "{subject: 'user:alice', silo: bank, expires_at: 2020-01-01T00:00:00Z}"
    report = load(store, parse(f"silos: {{bank: {{}}}}\nusers: {{alice: {{}}}}\ngrants: [{over}]"), **how)
    assert report.changes == 2 and "is over" in report.notes[0]


def test_an_id_that_means_another_grant_is_refused(store, how):
    load(store, parse("silos: {bank: {}, clinic: {}}\nusers: {alice: {}}"), **how)
    load(store, parse("grants: [{id: g-1, subject: 'user:alice', silo: bank}]"), **how)
    with pytest.raises(PolicyFileInvalid, match="silo"):
        load(store, parse("grants: [{id: g-1, subject: 'user:alice', silo: clinic}]"), **how)


def test_assertions_run_against_the_file_alone_or_the_live_policy(store, how, clock):
    document = parse(POLICY)
    assert failures_in_file(document, None) == []  # a grant without a beginning holds right after it was loaded
    late, *_ = failures_in_file(document, utc_now() + timedelta(days=100))
    assert (late.assertion.user, late.got, late.assertion.wanted) == ("alice", (), "permitted exactly bank")
    with store.engine.connect() as connection:
        assert len(failures(connection, document.tests, clock())) == 2


@pytest.mark.parametrize("content, where", [
    ("users: [alice]", "users"),
    ("users: {alice: {role: admin}}", "users.alice"),
    ("users: {alice: {roles: [root]}}", "users.alice"),
    ("users: {alice: {}, alice: {roles: [admin]}}", "line 1"),
    ("users: {123: {}}", "users.123"),
    ("users: {yes: {}}", "users.True"),
    ("users: {'a b': {}}", "users.a b"),
    ("groups: {staff: {members: [alice]}}", "groups.staff.members"),
    ("groups: {staff: {members: alice}}", "groups.staff.members"),
    ("silos: {bank: {status: vetoed}}", "silos.bank.status"),
    ("grants: {a: b}", "grants"),
    ("grants: [{silo: bank}]", "grants[0]"),
    ("grants: [{subject: 'user:a', silo: bank, effect: Deny}]", "grants[0].effect"),
    ("grants: [{subject: 'user:a', silo: bank, expires_at: 2027-01-01T00:00:00}]", "grants[0].expires_at"),
    ("grants: [{subject: 'user:a', silo: bank, expires_at: 2027-01-01}]", "grants[0].expires_at"),
    ("grants: [{subject: 'user:a', silo: bank, expires_at: soon}]", "grants[0].expires_at"),
    ("tests: [{user: alice}]", "tests[0]"),
    ("policies: {}", "the top"),
    ("just text", "the top"),
    ("users: {alice: {}\n", "line 2"),
    ("users: *nobody", "line 1"),
    ("!!python/object/apply:os.system ['true']", "line 1"),
    (b"\xff\xfe\x00", "its start"),
    ("{" * 3000, "its start"),
])  # fmt: skip
def test_a_file_that_is_no_policy_is_refused_with_the_place(content, where):
    with pytest.raises(PolicyFileInvalid) as refused:
        parse(content)
    assert f" at {where}: " in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_empty_file_is_an_empty_policy():
    assert parse("").users == {} and parse("").grants == ()


def test_a_missing_or_huge_file_is_named(tmp_path):
    with pytest.raises(PolicyFileInvalid, match=r"missing\.yaml"):
        read(tmp_path / "missing.yaml")
    with pytest.raises(PolicyFileInvalid):
        read(tmp_path)
    with open(tmp_path / "huge.yaml", "wb") as file:
        file.truncate(17 * 1024 * 1024)
    with pytest.raises(PolicyFileInvalid, match="bytes"):
        read(tmp_path / "huge.yaml")
