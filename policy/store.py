"""PolicyStore: every write to the policy. Each is one transaction with its audit row and the next policy version.

Every method takes `actor` and `reason`, and `expected_version` for callers that decided on what they had read: with
another version in the database it raises VersionMismatch and changes nothing. After a success with `expected_version=n`
the version is n + 1. With `dry_run=True` nothing is kept and the Diff says who would gain and lose which silo.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, NotRequired, Required, TypedDict, TypeVar, Unpack, overload

from sqlalchemy import Engine

from policy import grants, keys, silos, users
from policy.decision import permitted_for_all, policy_version
from policy.diff import Diff, compare
from policy.errors import PepperMissing
from policy.grants import NewGrant
from policy.ids import check_text
from policy.keys import IssuedKey
from policy.limits import Limits, clear_limits, set_limits
from policy.times import Never, from_micros, to_micros, utc_now
from policy.transaction import Change, change, named_database_errors

T = TypeVar("T")


class Write(TypedDict):
    """Who writes and why; with `expected_version`, only if the policy is still at that version."""

    actor: Required[str]
    reason: Required[str]
    expected_version: NotRequired[int | None]


class PolicyStore:
    """Writes to the policy database behind `engine` (see policy.db). Threads may share it.

    `pepper` is needed for keys only; `clock` gives the time of each write, timezone-aware.
    """

    def __init__(self, engine: Engine, pepper: bytes | None = None, clock: Callable[[], datetime] = utc_now) -> None:
        self.engine = engine
        self._pepper = pepper
        self.clock = clock

    def version(self) -> int:
        with named_database_errors(), self.engine.connect() as connection:
            return policy_version(connection)

    def write(self, step: Callable[[Change], T], **how: Unpack[Write]) -> T:
        """Runs any steps of policy.users, silos, grants and keys as one change."""
        with change(self.engine, self.clock, **how) as tx:
            return step(tx)

    def preview(
        self,
        step: Callable[[Change], object],
        at: datetime | None = None,
        silo_id: str | None = None,
        **how: Unpack[Write],
    ) -> Diff:
        """What `write` would do to everybody's permitted set at `at` (by default now); nothing is kept.

        `silo_id` is for steps that touch no other silo: it makes the comparison small.
        """
        with change(self.engine, self.clock, keep=False, **how) as tx:
            instant = from_micros(max(tx.now, tx.now if at is None else to_micros(at, "time of the preview")))
            before = permitted_for_all(tx.connection, instant, silo_id)
            step(tx)
            after = permitted_for_all(tx.connection, instant, silo_id)
            return compare(before, after, tx.version - 1)

    def record_event(self, actor: str, action: str, detail: Mapping[str, Any], reason: str) -> int:
        """Appends an event of another part to the audit log; the policy version stays. Returns its number."""
        check_text("action", action)
        with change(self.engine, self.clock, actor=actor, reason=reason, bump=False) as tx:
            return tx.record(action, **detail)

    def create_user(
        self, user_id: str, roles: Iterable[str] = ("analyst",), display_name: str = "", **how: Unpack[Write]
    ) -> int:
        """Raises UserExists, RoleUnknown."""
        return self._versioned(lambda tx: users.create_user(tx, user_id, roles, display_name), how)

    def set_roles(self, user_id: str, roles: Iterable[str], **how: Unpack[Write]) -> int:
        """Replaces the user's roles; keys lose the scopes no role allows any more. Raises UserUnknown, RoleUnknown."""
        return self._versioned(lambda tx: users.set_roles(tx, user_id, roles), how)

    @overload
    def disable_user(self, user_id: str, **how: Unpack[Write]) -> int: ...
    @overload
    def disable_user(self, user_id: str, *, dry_run: bool, **how: Unpack[Write]) -> int | Diff: ...
    def disable_user(self, user_id: str, *, dry_run: bool = False, **how: Unpack[Write]) -> int | Diff:
        """The user has no silo and no working key from now on. Raises UserUnknown."""
        return self._do(lambda tx: users.set_user_status(tx, user_id, "disabled"), dry_run, how)

    @overload
    def enable_user(self, user_id: str, **how: Unpack[Write]) -> int: ...
    @overload
    def enable_user(self, user_id: str, *, dry_run: bool, **how: Unpack[Write]) -> int | Diff: ...
    def enable_user(self, user_id: str, *, dry_run: bool = False, **how: Unpack[Write]) -> int | Diff:
        """Undoes disable_user: grants that still run and keys count again. Raises UserUnknown."""
        return self._do(lambda tx: users.set_user_status(tx, user_id, "active"), dry_run, how)

    def create_group(self, group_id: str, display_name: str = "", **how: Unpack[Write]) -> int:
        """Raises GroupExists."""
        return self._versioned(lambda tx: users.create_group(tx, group_id, display_name), how)

    @overload
    def add_member(self, group_id: str, member: str, **how: Unpack[Write]) -> int: ...
    @overload
    def add_member(self, group_id: str, member: str, *, dry_run: bool, **how: Unpack[Write]) -> int | Diff: ...
    def add_member(self, group_id: str, member: str, *, dry_run: bool = False, **how: Unpack[Write]) -> int | Diff:
        """`member` is user:ID or group:ID. Raises GroupUnknown, UserUnknown, GroupCycle, GroupTooDeep..."""
        return self._do(lambda tx: users.add_member(tx, group_id, member), dry_run, how)

    @overload
    def remove_member(self, group_id: str, member: str, **how: Unpack[Write]) -> int: ...
    @overload
    def remove_member(self, group_id: str, member: str, *, dry_run: bool, **how: Unpack[Write]) -> int | Diff: ...
    def remove_member(self, group_id: str, member: str, *, dry_run: bool = False, **how: Unpack[Write]) -> int | Diff:
        """Raises GroupUnknown, MembershipUnknown."""
        return self._do(lambda tx: users.remove_member(tx, group_id, member), dry_run, how)

    def add_silo(self, silo_id: str, display_name: str = "", status: str = "active", **how: Unpack[Write]) -> int:
        """Raises SiloExists, StatusUnknown."""
        return self._versioned(lambda tx: silos.add_silo(tx, silo_id, display_name, status), how)

    @overload
    def set_silo_status(
        self, silo_id: str, status: str, *, expected_status: str | None = ..., **how: Unpack[Write]
    ) -> int: ...
    @overload
    def set_silo_status(
        self, silo_id: str, status: str, *, expected_status: str | None = ..., dry_run: bool, **how: Unpack[Write]
    ) -> int | Diff: ...
    def set_silo_status(
        self,
        silo_id: str,
        status: str,
        *,
        expected_status: str | None = None,
        dry_run: bool = False,
        **how: Unpack[Write],
    ) -> int | Diff:
        """active, quarantined or suspended; the last two take the silo from everybody at once.

        With `expected_status` a quarantine can be lifted without lifting what somebody else set meanwhile
        (SiloStatusChanged). Raises SiloUnknown, StatusUnknown.
        """
        return self._do(lambda tx: silos.set_silo_status(tx, silo_id, status, expected_status), dry_run, how, silo_id)

    @overload
    def set_silo_veto(self, silo_id: str, vetoed: bool, **how: Unpack[Write]) -> int: ...
    @overload
    def set_silo_veto(self, silo_id: str, vetoed: bool, *, dry_run: bool, **how: Unpack[Write]) -> int | Diff: ...
    def set_silo_veto(self, silo_id: str, vetoed: bool, *, dry_run: bool = False, **how: Unpack[Write]) -> int | Diff:
        """The owner's word: while vetoed nobody may use the silo. `actor` must be an owner, else NotSiloOwner."""
        return self._do(lambda tx: silos.set_silo_veto(tx, silo_id, vetoed), dry_run, how, silo_id)

    def add_silo_owner(self, silo_id: str, user_id: str, **how: Unpack[Write]) -> int:
        """Raises SiloUnknown, UserUnknown, OwnerRoleMissing."""
        return self._versioned(lambda tx: silos.add_silo_owner(tx, silo_id, user_id), how)

    def remove_silo_owner(self, silo_id: str, user_id: str, **how: Unpack[Write]) -> int:
        """Raises SiloUnknown, OwnerUnknown."""
        return self._versioned(lambda tx: silos.remove_silo_owner(tx, silo_id, user_id), how)

    @overload
    def add_grant(
        self,
        subject: str,
        silo_id: str,
        effect: str = ...,
        *,
        not_before: datetime | None = ...,
        expires_at: datetime | Never | None = ...,
        **how: Unpack[Write],
    ) -> NewGrant: ...
    @overload
    def add_grant(
        self,
        subject: str,
        silo_id: str,
        effect: str = ...,
        *,
        not_before: datetime | None = ...,
        expires_at: datetime | Never | None = ...,
        dry_run: bool,
        **how: Unpack[Write],
    ) -> NewGrant | Diff: ...
    def add_grant(
        self,
        subject: str,
        silo_id: str,
        effect: str = "allow",
        *,
        not_before: datetime | None = None,
        expires_at: datetime | Never | None = None,
        dry_run: bool = False,
        **how: Unpack[Write],
    ) -> NewGrant | Diff:
        """`subject` is user:ID or group:ID, the grant's reason is the change's.

        An allow ends 90 days after its start unless `expires_at` says otherwise ("never" must be said); a deny without
        `expires_at` does not end. Raises UserUnknown, GroupUnknown, SiloUnknown, EffectUnknown, TimeInvalid,
        TimeWithoutZone.
        """

        def step(tx: Change) -> NewGrant:
            grant_id = grants.add_grant(tx, subject, silo_id, effect, not_before, expires_at)
            return NewGrant(grant_id, tx.version)

        return self.preview(step, not_before, silo_id, **how) if dry_run else self.write(step, **how)

    @overload
    def revoke_grant(self, grant_id: str, **how: Unpack[Write]) -> int: ...
    @overload
    def revoke_grant(self, grant_id: str, *, dry_run: bool, **how: Unpack[Write]) -> int | Diff: ...
    def revoke_grant(self, grant_id: str, *, dry_run: bool = False, **how: Unpack[Write]) -> int | Diff:
        """Raises GrantUnknown, GrantRevoked."""
        return self._do(lambda tx: grants.revoke_grant(tx, grant_id), dry_run, how)

    def create_key(
        self,
        user_id: str,
        scopes: Iterable[str],
        expires_at: datetime | Never | None = None,
        **how: Unpack[Write],
    ) -> IssuedKey:
        """A new key, good for 90 days unless said otherwise; its secret is not to be had again.

        Raises UserUnknown, UserNotActive, ScopeUnknown, ScopeNotAllowed, PepperMissing.
        """
        pepper = self._require_pepper()
        return self.write(lambda tx: keys.create_key(tx, pepper, user_id, scopes, expires_at), **how)

    def rotate_key(
        self,
        key_id: str,
        expires_at: datetime | Never | None = None,
        overlap: timedelta = timedelta(0),
        **how: Unpack[Write],
    ) -> IssuedKey:
        """A successor with the same scopes; the old key ends now, or after `overlap`. Raises KeyIdUnknown."""
        pepper = self._require_pepper()
        return self.write(lambda tx: keys.rotate_key(tx, pepper, key_id, expires_at, overlap), **how)

    def revoke_key(self, key_id: str, **how: Unpack[Write]) -> int:
        """Raises KeyIdUnknown, KeyAlreadyRevoked."""
        return self._versioned(lambda tx: keys.revoke_key(tx, key_id), how)

    def set_limits(self, subject: str, limits: Limits, **how: Unpack[Write]) -> int:
        """Sets the numbers given, for user:ID or key:ID. Raises NoLimitGiven, LimitInvalid, UserUnknown..."""
        return self._versioned(lambda tx: set_limits(tx, subject, limits), how)

    def clear_limits(self, subject: str, **how: Unpack[Write]) -> int:
        """The gateway's defaults count again for the subject. Raises LimitsNotSet."""
        return self._versioned(lambda tx: clear_limits(tx, subject), how)

    def _require_pepper(self) -> bytes:
        if self._pepper is None:
            raise PepperMissing
        return self._pepper

    def _versioned(self, step: Callable[[Change], object], how: Write) -> int:
        def versioned(tx: Change) -> int:
            step(tx)
            return tx.version

        return self.write(versioned, **how)

    def _do(
        self, step: Callable[[Change], object], dry_run: bool, how: Write, silo_id: str | None = None
    ) -> int | Diff:
        return self.preview(step, None, silo_id, **how) if dry_run else self._versioned(step, how)
