"""On PostgreSQL the parts need no more rights than docs/policy.md gives them."""

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import ProgrammingError

from policy import audit
from policy.db import create_engine_for
from policy.errors import DatabaseDenied, SiloUnknown
from policy.limits import Limits
from policy.reader import PolicyReader
from policy.store import PolicyStore

ROLES = """
DO $$ BEGIN CREATE ROLE policy_reader LOGIN; CREATE ROLE policy_writer LOGIN;
EXCEPTION WHEN duplicate_object THEN END $$;
GRANT SELECT ON ALL TABLES IN SCHEMA public TO policy_reader;
GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO policy_writer;
REVOKE UPDATE, DELETE ON audit FROM policy_writer;
"""


@pytest.fixture
def backend():
    return "postgresql"


@pytest.fixture
def engine_of(small, url):
    with small.engine.begin() as connection:
        connection.execute(text(ROLES))
    engines = []

    def make(role):
        as_role = make_url(url).set(username=role).render_as_string(hide_password=False)
        engines.append(create_engine_for(as_role))
        return engines[-1]

    yield make
    for engine in engines:
        engine.dispose()


def test_a_gateway_reads_with_select_alone(small, engine_of, how, clock, pepper):
    small.add_grant("user:alice", "bank", **how)
    _, secret = small.create_key("alice", ["chat"], **how)
    small.set_limits("user:alice", Limits(tokens_per_day=9), **how)
    engine = engine_of("policy_reader")
    with PolicyReader(engine, pepper) as reader:
        assert reader.version() == small.version()
        assert reader.permitted("alice", clock()).silos == ("bank",)
        assert reader.authenticate(secret, clock()).user_id == "alice"
        assert reader.limits("alice", "key") == (Limits(tokens_per_day=9), Limits())
    with pytest.raises(DatabaseDenied):
        PolicyStore(engine).create_user("eve", **how)


def test_a_coordinator_writes_without_rights_to_change_the_audit(small, engine_of, how):
    store = PolicyStore(engine_of("policy_writer"))
    store.add_grant("user:alice", "bank", **how)
    store.add_member("staff", "user:alice", **how)
    store.remove_member("staff", "user:alice", **how)
    store.set_limits("user:alice", Limits(tokens_per_day=9), **how)
    store.clear_limits("user:alice", **how)
    with pytest.raises(SiloUnknown):
        store.add_grant("user:alice", "nowhere", **how)
    with store.engine.connect() as connection:
        assert audit.verify(connection).ok
    with pytest.raises(ProgrammingError), store.engine.begin() as connection:
        connection.execute(text("UPDATE audit SET reason = 'other'"))
