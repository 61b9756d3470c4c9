"""Random histories against thirty plain lines that say what the policy means."""

from datetime import timedelta

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from policy import decision
from policy.audit import verify
from policy.db import create_engine_for
from policy.errors import PolicyError
from policy.explain import explain
from policy.store import PolicyStore

USERS, GROUPS, SILOS = ["alice", "Alice", "bob"], ["g0", "g1", "g2", "g3"], ["bank", "Bank", "clinic"]
SUBJECTS = [f"user:{user}" for user in USERS] + [f"group:{group}" for group in GROUPS]
HOURS = st.integers(0, 40)


class Reference:
    """What the policy means, in plain code over plain sets."""

    def __init__(self):
        self.disabled, self.status, self.vetoed = set(), {}, set()
        self.members = set()  # (group, subject)
        self.grants = {}  # id -> (subject, silo, effect, start, end)

    def subjects_of(self, subject):
        found = {subject}
        for group, member in self.members:
            if member == subject:
                found |= self.subjects_of(f"group:{group}")
        return found

    def check(self, user, silo, at):
        if user in self.disabled or self.status.get(silo) != "active" or silo in self.vetoed:
            return False
        around = self.subjects_of(f"user:{user}")
        effects = [
            effect
            for subject, where, effect, start, end in self.grants.values()
            if subject in around and where == silo and start <= at and (end is None or at < end)
        ]
        return "allow" in effects and "deny" not in effects

    def closes_a_cycle(self, group, member):
        return member in self.subjects_of(f"group:{group}")


def machine(new_database, clock, how):
    class Policy(RuleBasedStateMachine):
        @initialize()
        def start(self):
            self.engine = create_engine_for(new_database())
            self.store, self.reference, self.version = PolicyStore(self.engine, clock=clock), Reference(), 0
            for user in USERS:
                self.step(self.store.create_user(user, ["silo_owner"], **how))
            for group in GROUPS:
                self.step(self.store.create_group(group, **how))
            for silo in SILOS:
                self.step(self.store.add_silo(silo, **how))
                self.step(self.store.add_silo_owner(silo, "bob", **how))
                self.reference.status[silo] = "active"

        def step(self, version):
            assert version == self.version + 1
            self.version = version

        @rule(group=st.sampled_from(GROUPS), member=st.sampled_from(SUBJECTS))
        def add_member(self, group, member):
            edge = (group, member)
            possible = edge not in self.reference.members and not self.reference.closes_a_cycle(group, member)
            try:
                self.step(self.store.add_member(group, member, **how))
            except PolicyError:
                assert not possible
            else:
                assert possible
                self.reference.members.add(edge)

        @rule(group=st.sampled_from(GROUPS), member=st.sampled_from(SUBJECTS))
        def remove_member(self, group, member):
            if (group, member) in self.reference.members:
                self.step(self.store.remove_member(group, member, **how))
                self.reference.members.discard((group, member))

        @rule(
            subject=st.sampled_from(SUBJECTS),
            silo=st.sampled_from(SILOS),
            effect=st.sampled_from(["allow", "allow", "deny"]),
            start=HOURS,
            lasts=st.one_of(st.none(), st.integers(1, 40)),
        )
        def add_grant(self, subject, silo, effect, start, lasts):
            begin = clock() + timedelta(hours=start)
            end = None if lasts is None else begin + timedelta(hours=lasts)
            before = self.everybody(begin)
            options = {"not_before": begin, "expires_at": end or "never", **how}
            diff = self.store.add_grant(subject, silo, effect, dry_run=True, **options)
            grant = self.store.add_grant(subject, silo, effect, **options).grant_id
            self.step(self.version + 1)
            self.reference.grants[grant] = (subject, silo, effect, begin, end)
            after = self.everybody(begin)
            assert {user: set(silos) for user, silos in diff.gains.items()} == less(after, before)
            assert {user: set(silos) for user, silos in diff.losses.items()} == less(before, after)

        @rule(data=st.data())
        def revoke_grant(self, data):
            if self.reference.grants:
                grant = data.draw(st.sampled_from(sorted(self.reference.grants)))
                self.step(self.store.revoke_grant(grant, **how))
                del self.reference.grants[grant]

        @rule(silo=st.sampled_from(SILOS), status=st.sampled_from(["active", "quarantined", "suspended"]))
        def set_status(self, silo, status):
            self.step(self.store.set_silo_status(silo, status, **how))
            self.reference.status[silo] = status

        @rule(silo=st.sampled_from(SILOS), vetoed=st.booleans())
        def veto(self, silo, vetoed):
            if "bob" not in self.reference.disabled:
                self.step(self.store.set_silo_veto(silo, vetoed, actor="bob", reason="test"))
                (self.reference.vetoed.add if vetoed else self.reference.vetoed.discard)(silo)

        @rule(user=st.sampled_from(USERS), disabled=st.booleans())
        def disable(self, user, disabled):
            change = self.store.disable_user if disabled else self.store.enable_user
            self.step(change(user, **how))
            (self.reference.disabled.add if disabled else self.reference.disabled.discard)(user)

        def everybody(self, at):
            return {user: {silo for silo in SILOS if self.reference.check(user, silo, at)} for user in USERS}

        @invariant()
        def list_check_explain_and_reference_agree(self):
            with self.engine.connect() as connection:
                assert decision.policy_version(connection) == self.version
                for hours in (0, 20):
                    at = clock() + timedelta(hours=hours)
                    everybody = decision.permitted_for_all(connection, at)
                    for user, expected in self.everybody(at).items():
                        found = decision.permitted(connection, user, at)
                        assert set(found.silos) == expected == set(found.reasons)
                        assert everybody.get(user, found) == found
                        for silo in SILOS:
                            assert found.allows(silo) == (silo in expected)
                            assert not hours or explain(connection, user, silo, at).allowed == (silo in expected)

        def teardown(self):
            with self.engine.connect() as connection:
                verify(connection).require_ok()
            self.engine.dispose()

    return Policy


def less(one, other):
    return {user: one[user] - other[user] for user in one if one[user] - other[user]}


def test_random_histories_mean_what_the_reference_says(new_database, clock, how, backend):
    run_state_machine_as_test(
        machine(new_database, clock, how),
        settings=settings(
            max_examples=8 if backend == "sqlite" else 3,
            stateful_step_count=25,
            deadline=None,
            derandomize=True,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        ),
    )
