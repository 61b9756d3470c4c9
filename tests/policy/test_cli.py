"""`seqr policy`: readable, scriptable, and every mistake one sentence with its code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from policy import errors
from policy.cli import app
from policy.db import create_engine_for
from policy.keys import load_pepper
from policy.reader import PolicyReader
from policy.store import PolicyStore
from policy.times import utc_now


@pytest.fixture
def backend():
    """The commands are the same on both databases, so one journey on PostgreSQL is enough."""
    return "sqlite"


@pytest.fixture
def place(tmp_path, empty_url):
    return {"SEQR_POLICY_DATABASE_URL": empty_url, "SEQR_POLICY_PEPPER_FILE": str(tmp_path / "pepper")}


@pytest.fixture
def seqr(place):
    """Runs one command; errors with a code come out as they are, for the root command to print."""

    def run(*words, fails=None, status=0):
        result = CliRunner().invoke(app, [str(word) for word in words], env=place)
        if fails is not None:
            assert type(result.exception) is fails, result.output
            return str(result.exception)
        assert result.exit_code == status, (result.output, result.exception)
        return json.loads(result.output) if "--json" in words else result.output

    return run


@pytest.fixture
def ready(seqr):
    seqr("init")
    for user in ("alice", "bob"):
        seqr("user", "create", user, "--reason", "hired")
    seqr("silo", "add", "bank", "--name", "The bank", "--reason", "joined")
    return seqr


def test_init_prints_the_first_admin_key_exactly_once(seqr, place):
    made = seqr("init", "--admin", "ada", "--json")
    engine = create_engine_for(place["SEQR_POLICY_DATABASE_URL"])
    with PolicyReader(engine, load_pepper(Path(place["SEQR_POLICY_PEPPER_FILE"]))) as reader:
        found = reader.authenticate(made["key"], utc_now())
        assert reader.version() == made["policy_version"] == 1
    engine.dispose()
    assert found.user_id == "ada" and found.roles == {"admin"} and "admin" in found.scopes
    seqr("init", "--admin", "eve", fails=errors.AlreadyInitialised)
    for command in (["key", "list"], ["audit", "list"], ["user", "list"], ["export"]):
        assert made["key"].split("_", 2)[2] not in seqr(*command)


def test_an_init_that_was_cut_short_can_be_repeated(seqr, place):
    seqr("upgrade")
    Path(place["SEQR_POLICY_PEPPER_FILE"]).write_text("ab" * 32)
    os.chmod(place["SEQR_POLICY_PEPPER_FILE"], 0o600)
    assert seqr("init", "--json")["key"].startswith("seqr_")


@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
def test_from_an_empty_policy_to_a_permitted_silo_and_back(ready):
    ready("group", "create", "staff", "--reason", "new team")
    ready("group", "add", "staff", "user:alice", "--reason", "joins")
    dry = ready("grant", "group:staff", "bank", "--reason", "season", "--dry-run", "--json")
    assert dry["gains"] == {"alice": ["bank"]} and dry["dry_run"]
    assert ready("check", "alice", "bank", status=3) == "denied\n"
    grant = ready("grant", "group:staff", "bank", "--expires", "30d", "--reason", "season", "--json")["grant_id"]
    assert ready("check", "alice", "bank") == "allowed\n"
    found = ready("permitted", "alice", "--json")
    assert found["silos"] == ["bank"] and found["why"][0]["grant_id"] == grant
    why = ready("explain", "alice", "bank", "--json")
    assert why["allowed"] and why["path"] == ["user:alice", "group:staff", grant]
    assert ready("grants", "--json")[0]["grant_id"] == grant
    ready("revoke", grant, "--reason", "over")
    assert ready("permitted", "alice", "--json")["silos"] == []
    assert ready("grants", "--json") == [] and ready("grants", "--revoked", "--json")[0]["revoked_at"]


def test_tables_show_what_a_person_looks_for(ready):
    ready("grant", "user:alice", "bank", "--reason", "[red]season[/red]")
    for command, words in [
        (["grants"], ["user:alice", "bank", "allow", "[red]season[/red]"]),
        (["user", "list"], ["alice", "bob", "analyst", "active"]),
        (["silo", "list"], ["bank", "The bank", "active"]),
        (["permitted", "alice"], ["bank", "user:alice"]),
        (["explain", "alice", "bank"], ["allowed", "wins"]),
        (["explain", "bob", "bank"], ["denied", "No rule matches"]),
        (["audit", "list"], ["grant.add", "cli:"]),
        (["key", "list"], ["admin", "chat"]),
        (["grant", "user:bob", "bank", "--deny", "--reason", "r", "--dry-run"], ["Nobody would gain or lose"]),
    ]:
        output = ready(*command)
        for word in words:
            assert word in output, (command, output)


def test_keys_are_made_rotated_and_revoked(ready):
    made = ready("key", "create", "alice", "--expires", "12h", "--reason", "notebook", "--json")
    assert made["key"].startswith("seqr_")
    turned = ready("key", "rotate", made["key_id"], "--reason", "yearly", "--json")
    ready("key", "revoke", turned["key_id"], "--reason", "left")
    shown = {row["key_id"]: row for row in ready("key", "list", "--json")}
    assert shown[made["key_id"]]["revoked_at"] and shown[turned["key_id"]]["revoked_at"]
    assert len(ready("key", "create", "alice", "--reason", "r").splitlines()) == 2


def test_a_new_grant_is_printed_with_its_own_version_though_another_change_followed(ready, how, monkeypatch):
    add_grant = PolicyStore.add_grant

    def overtaken(store, *args, **options):
        made = add_grant(store, *args, **options)
        store.create_user("late", **how)
        return made

    before = ready("user", "create", "carol", "--reason", "r", "--json")["policy_version"]
    monkeypatch.setattr(PolicyStore, "add_grant", overtaken)
    assert ready("grant", "user:alice", "bank", "--reason", "r", "--json")["policy_version"] == before + 1


def test_owners_veto_on_the_command_line(ready):
    ready("user", "roles", "bob", "--role", "silo_owner", "--reason", "owns")
    ready("silo", "owner", "bank", "bob", "--reason", "owns")
    ready("grant", "user:alice", "bank", "--reason", "r")
    ready("silo", "veto", "bank", "--reason", "r", fails=errors.NotSiloOwner)
    ready("silo", "veto", "bank", "--actor", "bob", "--reason", "review")
    ready("check", "alice", "bank", status=3)
    ready("silo", "veto", "bank", "--lift", "--actor", "bob", "--reason", "done")
    ready("check", "alice", "bank")


def test_the_audit_log_is_verified_against_a_kept_head(ready):
    kept = ready("audit", "head").strip()
    ready("silo", "status", "bank", "suspended", "--expect", "active", "--reason", "r")
    assert "continue the shipped head" in ready("audit", "verify", "--head", kept)
    assert "All 6 rows" in ready("audit", "verify")
    assert ready("audit", "verify", "--json")["ok"]
    ready("audit", "verify", "--head", f"{kept.split(':')[0]}:{'0' * 64}", fails=errors.AuditBroken)
    ready("audit", "verify", "--head", "nonsense", fails=errors.HeadMalformed)


def test_a_policy_file_goes_out_is_tested_and_comes_in(ready, tmp_path):
    ready("grant", "user:alice", "bank", "--reason", "r")
    file = tmp_path / "policy.yaml"
    file.write_text(ready("export") + "tests:\n- {user: alice, permitted: [bank]}\n- {user: bob, permitted: []}\n")
    assert "All 2 assertions hold" in ready("test", file)
    assert "All 2 assertions hold" in ready("test", file, "--live")
    assert ready("load", file, "--reason", "r", "--json")["changes"] == 0
    file.write_text(file.read_text().replace("user: bob, permitted: []", "user: bob, permitted: [bank]"))
    ready("test", file, fails=errors.PolicyTestsFailed)
    ready("load", file, "--reason", "r", fails=errors.PolicyTestsFailed)


def test_mistakes_have_names(ready, place, tmp_path):
    more = ["--reason", "r"]
    assert "'nowhere'" in ready("grant", "user:alice", "nowhere", *more, fails=errors.SiloUnknown)
    ready("grant", "user:zoe", "bank", *more, fails=errors.UserUnknown)
    ready("grant", "alice", "bank", *more, fails=errors.SubjectMalformed)
    ready("grant", "user:alice", "bank", fails=errors.ReasonMissing)
    ready("grant", "user:alice", "bank", "--expires", "soon", *more, fails=errors.TimeInvalid)
    ready("grant", "user:alice", "bank", "--expires", "2030-01-01", *more, fails=errors.TimeWithoutZone)
    ready("grant", "user:alice", "bank", "--if-version", "1", *more, fails=errors.VersionMismatch)
    ready("revoke", "grant-0", *more, fails=errors.GrantUnknown)
    ready("user", "create", "alice", *more, fails=errors.UserExists)
    ready("silo", "status", "bank", "gone", *more, fails=errors.StatusUnknown)
    ready("load", tmp_path / "missing.yaml", *more, fails=errors.PolicyFileInvalid)
    ready("user", "list", "--database", "nonsense", fails=errors.DatabaseUrlInvalid)
    ready("user", "list", "--database", f"sqlite:///{tmp_path}/typo.db", fails=errors.DatabaseUnreachable)
    assert not (tmp_path / "typo.db").exists(), "a typo makes no database"
    (tmp_path / "letter.txt").write_text("Dear Sir, this is no database. " * 200)
    ready("user", "list", "--database", f"sqlite:///{tmp_path}/letter.txt", fails=errors.DatabaseUnreachable)
    ready("init", "--database", f"sqlite:///{tmp_path}/letter.txt", fails=errors.DatabaseUnreachable)
    ready("user", "list", "--database", f"sqlite:///{tmp_path}", fails=errors.DatabaseUnreachable)
    (tmp_path / "nothing.db").touch()
    ready("user", "list", "--database", f"sqlite:///{tmp_path}/nothing.db", fails=errors.SchemaOutdated)
    place["SEQR_POLICY_PEPPER_FILE"] = ""
    ready("key", "create", "alice", *more, fails=errors.PepperMissing)
    place["SEQR_POLICY_DATABASE_URL"] = ""
    ready("user", "list", fails=errors.DatabaseUrlMissing)
    ready("init", fails=errors.DatabaseUrlMissing)


def test_the_installed_command_works_and_fails_in_one_sentence(tmp_path):
    seqr = [sys.executable, "-c", "from seqr.cli import main; main()", "policy"]
    env = os.environ | {
        "SEQR_POLICY_DATABASE_URL": f"sqlite:///{tmp_path}/policy.db",
        "SEQR_POLICY_PEPPER_FILE": str(tmp_path / "pepper"),
    }
    made = subprocess.run([*seqr, "init"], env=env, capture_output=True, text=True)
    assert made.returncode == 0 and made.stdout.count("seqr_") == 1 and made.stderr == ""
    again = subprocess.run([*seqr, "init"], env=env, capture_output=True, text=True)
    assert again.returncode == 1 and again.stdout == ""
    assert again.stderr.startswith("error[already_initialised]: ") and again.stderr.count("\n") == 1


def test_the_command_line_loads_no_database_code_before_it_is_needed():
    code = "import sys, policy.cli; sys.exit(any(name in sys.modules for name in ('sqlalchemy', 'alembic', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_limits_are_set_listed_and_cleared(ready):
    ready("limits", "set", "user:alice", "--requests-per-minute", 30, "--reason", "trial")
    assert ready("limits", "list", "--json")[0]["requests_per_minute"] == 30
    assert "user:alice" in ready("limits", "list")
    ready("limits", "clear", "user:alice", "--reason", "trial over")
    assert ready("limits", "list", "--json") == []
    ready("limits", "set", "user:alice", "--reason", "r", fails=errors.NoLimitGiven)
