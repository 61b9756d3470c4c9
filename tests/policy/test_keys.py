"""API keys: shown once, found by prefix, refused by name, and never repeated in a message, a log or the audit."""

import logging
import stat
from datetime import datetime, timedelta
from itertools import pairwise

import pytest
from sqlalchemy import event, text

from policy import audit, errors, keys, listing
from policy.limits import Limits
from policy.reader import PolicyReader
from policy.store import PolicyStore


@pytest.fixture
def login(engine, clock, pepper):
    with PolicyReader(engine, pepper) as reader:
        yield lambda presented, at=None: reader.authenticate(presented, at or clock())


def test_a_key_opens_as_its_user_with_its_scopes(small, login, how):
    small.set_roles("alice", ["analyst", "auditor"], **how)
    key_id, secret = small.create_key("alice", ["chat"], **how)
    found = login(secret)
    assert (found.user_id, found.key_id, found.scopes) == ("alice", key_id, {"chat"})
    assert found.roles == {"analyst", "auditor"}
    found.require("chat")
    with pytest.raises(errors.ScopeMissing):
        found.require("audit")
    prefix, body = secret.split("_", 2)[1:]
    assert secret.startswith("seqr_") and len(prefix) == 8 and len(body) == 43


def test_wrong_keys_are_unknown_and_never_echoed(small, login, how):
    _, secret = small.create_key("alice", ["chat"], **how)
    last = "A" if secret[-1] != "A" else "B"
    wrong = ["", "x", secret[:-1], secret + "x", secret[:-1] + last, secret.upper(), f" {secret}", f"{secret}\n", None]
    wrong += [
        "seqr_" + "a" * 8 + "_" + "b" * 43,
        secret.replace("seqr_", "seqs_"),
        "\x00",
        "\ud800" * 57,
        "é" * 57,
        b"x",
    ]
    for presented in wrong:
        with pytest.raises(errors.KeyUnknown) as refused:
            login(presented)
        if presented:
            assert str(presented) not in str(refused.value) or len(str(presented)) == 1
    assert login(secret).user_id == "alice"


def test_what_has_not_a_keys_form_is_refused_without_the_database(engine, pepper, clock):
    asked = []
    event.listen(engine, "before_cursor_execute", lambda *call: asked.append(call[2]))
    with PolicyReader(engine, pepper) as reader:
        for presented in ("", "x", "seqr_short", "é" * 57, None):
            with pytest.raises(errors.KeyUnknown):
                reader.authenticate(presented, clock())
        assert asked == []
        with pytest.raises(errors.KeyUnknown):
            reader.authenticate("seqr_" + "a" * 8 + "_" + "b" * 43, clock())
        assert len(asked) == 1


def test_an_expired_key_is_named_so(small, login, how, clock):
    _, default = small.create_key("alice", ["chat"], **how)
    _, hour = small.create_key("alice", ["chat"], clock() + timedelta(hours=1), **how)
    _, endless = small.create_key("alice", ["chat"], "never", **how)
    login(hour, clock() + timedelta(minutes=59))
    for secret, at in [(hour, timedelta(hours=1)), (default, timedelta(days=90))]:
        with pytest.raises(errors.KeyExpired):
            login(secret, clock() + at)
    login(endless, clock() + timedelta(days=36500))


def test_a_revoked_key_is_named_so_at_once(small, login, how):
    key_id, secret = small.create_key("alice", ["chat"], **how)
    small.revoke_key(key_id, **how)
    with pytest.raises(errors.KeyRevoked):
        login(secret)


def test_only_the_true_key_learns_that_it_is_revoked(small, login, how):
    key_id, secret = small.create_key("alice", ["chat"], **how)
    small.revoke_key(key_id, **how)
    with pytest.raises(errors.KeyUnknown):
        login(secret[:-4] + ("AAAA" if secret[-4:] != "AAAA" else "BBBB"))


def test_a_disabled_users_key_is_named_so(small, login, how):
    _, secret = small.create_key("alice", ["chat"], **how)
    small.disable_user("alice", **how)
    with pytest.raises(errors.UserDisabled):
        login(secret)
    with pytest.raises(errors.UserNotActive):
        small.create_key("alice", ["chat"], **how)


def test_a_key_loses_a_scope_with_the_role_that_allowed_it(small, login, how):
    small.set_roles("alice", ["admin", "analyst"], **how)
    _, secret = small.create_key("alice", ["chat", "admin"], **how)
    small.set_roles("alice", ["analyst"], **how)
    assert login(secret).scopes == {"chat"}


@pytest.mark.parametrize("scopes, error", [(["admin"], errors.ScopeNotAllowed), (["root"], errors.ScopeUnknown)])
def test_a_scope_beyond_the_roles_is_refused(small, how, scopes, error):
    version = small.version()
    with pytest.raises(error):
        small.create_key("alice", scopes, **how)
    assert small.version() == version


def test_rotation_keeps_user_and_scopes_and_ends_the_old_key(small, login, how, clock):
    key_id, old = small.create_key("alice", ["chat"], **how)
    new = small.rotate_key(key_id, **how)
    with pytest.raises(errors.KeyRevoked):
        login(old)
    assert login(new.secret).scopes == {"chat"}
    newer = small.rotate_key(new.key_id, overlap=timedelta(hours=2), **how)
    login(new.secret), login(newer.secret)
    with pytest.raises(errors.KeyExpired):
        login(new.secret, clock() + timedelta(hours=2))


def test_another_pepper_opens_nothing(small, engine, how, clock):
    _, secret = small.create_key("alice", ["chat"], **how)
    with PolicyReader(engine, b"\1" * 32) as stranger, pytest.raises(errors.KeyUnknown):
        stranger.authenticate(secret, clock())
    with PolicyReader(engine) as without, pytest.raises(errors.PepperMissing):
        without.authenticate(secret, clock())
    with pytest.raises(errors.PepperMissing):
        PolicyStore(engine).create_key("alice", ["chat"], **how)


def test_a_naive_time_is_refused(small, login, how):
    _, secret = small.create_key("alice", ["chat"], **how)
    with pytest.raises(errors.TimeWithoutZone):
        login(secret, datetime(2026, 1, 1))


def test_the_secret_is_in_no_table_log_repr_or_message(small, login, how, engine, caplog):
    caplog.set_level(logging.DEBUG)
    logging.getLogger("sqlalchemy.engine").setLevel(logging.DEBUG)
    issued = small.create_key("alice", ["chat"], **how)
    login(issued.secret)
    body = issued.secret.split("_", 2)[2]
    with pytest.raises(errors.KeyUnknown) as refused:
        login(issued.secret[:-1])
    logging.getLogger("sqlalchemy.engine").setLevel(logging.WARNING)
    assert caplog.records, "the statements were logged"
    with engine.connect() as connection:
        stored = [
            str(row) for table in ("api_keys", "audit") for row in connection.execute(text(f"SELECT * FROM {table}"))
        ]
        shown = [str(listing.keys(connection)), str(list(audit.entries(connection)))]
    for place in [
        *stored,
        *shown,
        caplog.text,
        repr(issued),
        str(issued),
        str(refused.value),
        repr(login(issued.secret)),
    ]:
        assert body not in place and body[:-1] not in place


def test_a_thousand_keys_differ(small, how, pepper):
    def many(change):
        return [keys.create_key(change, pepper, "alice", ["chat"], None).secret for _ in range(300)]

    secrets = sorted(secret.split("_", 2)[2] for secret in small.write(many, **how))
    assert all(one[:10] != other[:10] for one, other in pairwise(secrets))


def test_the_pepper_file_is_private_and_made_once(tmp_path):
    path = tmp_path / "pepper"
    pepper = keys.create_pepper(path)
    assert len(pepper) == 32 and keys.load_pepper(path) == pepper
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(errors.PepperInvalid):
        keys.create_pepper(path)
    assert keys.load_pepper(path) == pepper


@pytest.mark.parametrize("content", ["", "zz" * 32, "ab" * 31, "ab" * 33, "é" * 32])
def test_a_spoilt_pepper_file_is_named_and_not_shown(tmp_path, content):
    path = tmp_path / "pepper"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(errors.PepperInvalid) as refused:
        keys.load_pepper(path)
    assert not content or content not in str(refused.value)
    with pytest.raises(errors.PepperInvalid):
        keys.load_pepper(tmp_path / "missing")


def test_a_pepper_open_to_everybody_is_refused(tmp_path):
    keys.create_pepper(tmp_path / "pepper")
    (tmp_path / "pepper").chmod(0o644)
    with pytest.raises(errors.PepperInvalid):
        keys.load_pepper(tmp_path / "pepper")


def test_a_log_in_counts_for_an_active_user_who_may_chat_and_for_chat_alone(small, engine, how):
    small.set_roles("alice", ["admin", "service"], **how)
    with PolicyReader(engine) as reader:
        found = reader.logged_in("alice")
        assert (found.user_id, found.key_id, found.scopes) == ("alice", None, {"chat"})
        assert found.roles == {"admin", "service"}
        with pytest.raises(errors.ScopeMissing):
            found.require("metrics")


def test_a_log_in_of_anybody_else_is_refused_in_the_same_words(small, engine, how):
    small.create_user("clerk", ["auditor"], **how)
    small.disable_user("bob", **how)
    with PolicyReader(engine) as reader:
        reader.logged_in("alice")
        for user_id in ("nobody", "bob", "clerk", "Alice", "alice ", "", "\x00", "\ud800", "a" * 201):
            with pytest.raises(errors.LoginNotAccepted) as refused:
                reader.logged_in(user_id)
            assert refused.value.code == "login_not_accepted"
            assert (
                str(refused.value) == "You are not logged in as an active user who may ask this gateway; ask an admin."
            )


def test_a_user_who_is_disabled_is_out_at_the_next_look(small, engine, how):
    with PolicyReader(engine) as reader:
        reader.logged_in("alice")
        small.disable_user("alice", **how)
        with pytest.raises(errors.LoginNotAccepted):
            reader.logged_in("alice")
        small.enable_user("alice", **how)
        assert reader.logged_in("alice").user_id == "alice"


def test_somebody_without_a_key_has_the_users_limits_and_no_keys(small, engine, how):
    key_id, _ = small.create_key("alice", ["chat"], **how)
    small.set_limits("user:alice", Limits(requests_per_minute=2), **how)
    small.set_limits(f"key:{key_id}", Limits(requests_per_minute=1), **how)
    with PolicyReader(engine) as reader:
        assert reader.limits("alice", key_id) == (Limits(requests_per_minute=2), Limits(requests_per_minute=1))
        assert reader.limits("alice", None) == (Limits(requests_per_minute=2), Limits())
