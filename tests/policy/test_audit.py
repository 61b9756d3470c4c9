"""The audit chain against whoever can write to the database: each attack with what shows it, or does not."""

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DatabaseError

from policy import audit
from policy.errors import AuditBroken, HeadMalformed


@pytest.fixture
def log(small, how):
    """Some ten rows."""
    small.add_member("staff", "user:alice", **how)
    for silo in ("bank", "clinic"):
        small.add_grant("group:staff", silo, **how)
    return small


def verify(store, head=None):
    with store.engine.connect() as connection:
        return audit.verify(connection, head)


def head(store):
    with store.engine.connect() as connection:
        return audit.head(connection)


def tamper(store, *statements):
    """As a database administrator would, who can drop the triggers first."""
    with store.engine.begin() as connection:
        if connection.dialect.name == "sqlite":
            names = connection.execute(text("SELECT name FROM sqlite_master WHERE type = 'trigger'")).scalars().all()
            for name in names:
                connection.execute(text(f"DROP TRIGGER {name}"))
        else:
            connection.execute(text("SET LOCAL session_replication_role = replica"))
        for statement in statements:
            connection.execute(text(statement))


def test_an_untouched_log_verifies(log):
    report = verify(log, head(log))
    assert report.ok and report.first_bad is None and report.rows == head(log).seq == 8
    report.require_ok()


def test_an_empty_log_verifies(store):
    assert verify(store).ok and verify(store).rows == 0
    assert verify(store, audit.Head(0, audit.GENESIS)).ok


@pytest.mark.parametrize("statement", [
    "UPDATE audit SET reason = 'other' WHERE seq = 3",
    "UPDATE audit SET reason = reason WHERE seq = 3",
    "DELETE FROM audit WHERE seq = 8",
    "DELETE FROM audit",
    "TRUNCATE audit",
    "INSERT OR REPLACE INTO audit SELECT * FROM audit WHERE seq = 8",
    "INSERT INTO audit SELECT * FROM audit WHERE seq = 8 ON CONFLICT (seq) DO UPDATE SET actor = 'eve'",
])  # fmt: skip
def test_the_database_refuses_to_change_or_delete_rows(log, statement):
    if ("TRUNCATE" in statement) == (log.engine.dialect.name == "sqlite") and "TRUNCATE" in statement:
        pytest.skip("SQLite has no TRUNCATE")
    if "OR REPLACE" in statement and log.engine.dialect.name != "sqlite":
        pytest.skip("PostgreSQL has no REPLACE")
    with pytest.raises(DatabaseError), log.engine.begin() as connection:
        connection.execute(text(statement))
    assert verify(log).ok


COLUMNS = {
    "at": "at + 1",
    "actor": "'eve'",
    "action": "action || 'x'",
    "detail": "replace(detail, 'alice', 'alicf')",
    "reason": "'Test'",
    "policy_version": "policy_version + 1",
    "prev_hash": "replace(prev_hash, substr(prev_hash, 1, 1), 'x')",
    "hash": "replace(hash, substr(hash, 1, 1), 'x')",
}


@pytest.mark.parametrize("column", COLUMNS)
def test_a_changed_column_is_found_at_its_row(log, column):
    tamper(log, f"UPDATE audit SET {column} = {COLUMNS[column]} WHERE seq = 6")
    report = verify(log)
    assert not report.ok and report.first_bad == 6
    with pytest.raises(AuditBroken, match="row 6"):
        report.require_ok()


def test_every_single_flipped_character_of_a_row_is_found(log):
    with log.engine.connect() as connection:
        detail = connection.execute(text("SELECT detail FROM audit WHERE seq = 6")).scalar_one()
    for place in range(0, len(detail), 7):
        flipped = detail[:place] + chr(ord(detail[place]) ^ 1) + detail[place + 1 :]
        tamper(log, f"UPDATE audit SET detail = '{flipped}' WHERE seq = 6".replace(":", r"\:"))
        assert verify(log).first_bad == 6
    tamper(log, f"UPDATE audit SET detail = '{detail}' WHERE seq = 6".replace(":", r"\:"))
    assert verify(log).ok


def test_a_removed_row_is_found(log):
    tamper(log, "DELETE FROM audit WHERE seq = 4")
    assert verify(log).first_bad == 4


def test_a_removed_first_row_is_found(log):
    tamper(log, "DELETE FROM audit WHERE seq = 1")
    assert verify(log).first_bad == 1


def test_two_rows_in_exchanged_order_are_found(log):
    tamper(
        log,
        "UPDATE audit SET seq = 100 WHERE seq = 3",
        "UPDATE audit SET seq = 3 WHERE seq = 4",
        "UPDATE audit SET seq = 4 WHERE seq = 100",
    )
    assert verify(log).first_bad == 3


def test_an_added_row_is_found(log):
    tamper(
        log,
        "INSERT INTO audit SELECT 9, at, actor, action, detail, reason, policy_version, hash, hash FROM audit LIMIT 1",
    )
    assert verify(log).first_bad == 9


def test_rows_cut_off_the_end_carelessly_are_found(log):
    tamper(log, "DELETE FROM audit WHERE seq > 6")
    assert verify(log).first_bad == 7


def test_rows_cut_off_the_end_carefully_show_only_against_a_shipped_head(log):
    shipped = head(log)
    tamper(log, *cut_to(6))
    assert verify(log).ok, "the shorter chain is whole in itself"
    for kept in (shipped, shipped.hash):
        report = verify(log, kept)
        assert not report.ok and report.first_bad == 7


def test_history_written_anew_shows_only_against_a_shipped_head(log, how):
    shipped = head(log)
    tamper(log, *cut_to(6))
    for user in ("eve", "eva", "evi"):
        log.create_user(user, **how)
    assert verify(log).ok
    report = verify(log, shipped)
    assert not report.ok and report.first_bad == shipped.seq


def test_a_log_that_went_on_continues_the_shipped_head(log, how):
    shipped = head(log)
    log.create_user("carol", **how)
    for kept in (shipped, shipped.hash):
        report = verify(log, kept)
        assert report.ok and report.compared_with_shipped_head


def test_a_policy_version_set_back_is_found(log):
    """Set back, it would let a gateway go on with decisions that were revoked."""
    tamper(log, "UPDATE policy_state SET version = version - 1")
    assert not verify(log).ok


def test_an_emptied_database_is_found_against_a_shipped_head(log):
    shipped = head(log)
    tamper(
        log, "DELETE FROM audit", f"UPDATE policy_state SET version = 0, audit_seq = 0, audit_hash = '{audit.GENESIS}'"
    )
    assert verify(log).ok
    assert verify(log, shipped).first_bad == 1


def test_a_head_is_read_as_it_was_printed(log):
    shipped = head(log)
    assert audit.parse_head(f"{shipped.seq}:{shipped.hash}\n") == shipped
    assert audit.parse_head(shipped.hash) == shipped.hash
    for malformed in ("", "8", "8:", "8:abc", f"-1:{shipped.hash}", f"x:{shipped.hash}", f"8:{'Z' * 64}"):
        with pytest.raises(HeadMalformed):
            audit.parse_head(malformed)


def cut_to(seq):
    return (
        f"DELETE FROM audit WHERE seq > {seq}",
        f"UPDATE policy_state SET audit_seq = {seq}, "
        f"audit_hash = (SELECT hash FROM audit WHERE seq = {seq}), "
        f"version = (SELECT policy_version FROM audit WHERE seq = {seq})",
    )
