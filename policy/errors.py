"""What can go wrong, one class per rule; five families so that a web layer can map them without knowing each class."""

from __future__ import annotations

from collections.abc import Iterable


class PolicyError(Exception):
    """A refused request. `code` is stable; the message is one sentence saying what was wrong and what to do."""

    code = "policy_error"
    sentence = "The policy refused the request."

    def __init__(self, message: str = "") -> None:
        super().__init__(message or self.sentence)


class InvalidInput(PolicyError):
    """The request is malformed (HTTP 422)."""

    code = "invalid_input"


class NotFound(PolicyError):
    """The request names something that does not exist (HTTP 404)."""

    code = "not_found"


class Conflict(PolicyError):
    """The request contradicts the present state (HTTP 409)."""

    code = "conflict"


class NotAuthenticated(PolicyError):
    """The presented credential does not count (HTTP 401)."""

    code = "not_authenticated"


class NotAllowed(PolicyError):
    """The caller is known but may not do this (HTTP 403)."""

    code = "not_allowed"


class Unavailable(PolicyError):
    """The database cannot answer now (HTTP 503)."""

    code = "policy_unavailable"


class ActorMissing(InvalidInput):
    code = "actor_missing"
    sentence = "This change names nobody as its author; pass the actor who makes it."


class ReasonMissing(InvalidInput):
    code = "reason_missing"
    sentence = "This change has no reason; say in a few words why it is made."


class TextInvalid(InvalidInput):
    code = "text_invalid"

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"The {field} {problem}; send plain readable text.")


class IdInvalid(InvalidInput):
    code = "id_invalid"

    def __init__(self, kind: str, value: object) -> None:
        super().__init__(
            f"{value!r:.120} is not a {kind} id; use 1 to 200 printable characters without spaces or controls."
        )


class SubjectMalformed(InvalidInput):
    code = "subject_malformed"

    def __init__(self, value: object) -> None:
        super().__init__(f"{value!r:.120} names no subject; write user:ID or group:ID.")


class _NotOneOf(InvalidInput):
    kind = ""

    def __init__(self, value: object, known: Iterable[str]) -> None:
        super().__init__(f"{value!r:.60} is no {self.kind}; use one of {', '.join(known)}.")


class LimitSubjectMalformed(InvalidInput):
    code = "limit_subject_malformed"

    def __init__(self, value: object) -> None:
        super().__init__(f"{value!r:.80} is neither user:ID nor key:ID.")


class LimitInvalid(InvalidInput):
    code = "limit_invalid"

    def __init__(self, name: str, value: object) -> None:
        super().__init__(f"{name} is {value!r:.40}; it must be a whole number from 1 to 2**53.")


class NoLimitGiven(InvalidInput):
    code = "no_limit_given"

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__(f"No limit is given; give one or more of {', '.join(names)}.")


class EffectUnknown(_NotOneOf):
    code, kind = "effect_unknown", "effect"


class RoleUnknown(_NotOneOf):
    code, kind = "role_unknown", "role"


class ScopeUnknown(_NotOneOf):
    code, kind = "scope_unknown", "scope"


class StatusUnknown(_NotOneOf):
    code, kind = "status_unknown", "silo status"


class TimeWithoutZone(InvalidInput):
    code = "time_without_zone"

    def __init__(self, field: str, value: object) -> None:
        super().__init__(f"The {field} {value!s:.60} has no time zone; give one, as in 2026-12-31T12:00:00Z.")


class TimeInvalid(InvalidInput):
    code = "time_invalid"

    def __init__(self, field: str, value: object, expected: str) -> None:
        super().__init__(f"The {field} {value!s:.60} is not usable; give {expected}.")


class _NameUnknown(NotFound):
    kind = ""

    def __init__(self, name: str) -> None:
        super().__init__(f"There is no {self.kind} {name!r}; create it first or check the spelling (case counts).")


class UserUnknown(_NameUnknown):
    code, kind = "user_unknown", "user"


class GroupUnknown(_NameUnknown):
    code, kind = "group_unknown", "group"


class SiloUnknown(_NameUnknown):
    code, kind = "silo_unknown", "silo"


class GrantUnknown(NotFound):
    code = "grant_unknown"

    def __init__(self, grant_id: str) -> None:
        super().__init__(f"There is no grant {grant_id!r:.120}; list the grants to find its id.")


class KeyIdUnknown(NotFound):
    code = "key_id_unknown"

    def __init__(self, key_id: str) -> None:
        super().__init__(f"There is no key with the id {key_id!r:.60}; list the keys to find it.")


class LimitsNotSet(NotFound):
    code = "limits_not_set"

    def __init__(self, subject: str) -> None:
        super().__init__(f"No limits are set for {subject!r:.80}; the gateway's defaults count for it.")


class MembershipUnknown(NotFound):
    code = "membership_unknown"

    def __init__(self, group_id: str, member: str) -> None:
        super().__init__(f"{member!r} is not a direct member of group {group_id!r}; nothing was removed.")


class _NameTaken(Conflict):
    kind = ""

    def __init__(self, name: str) -> None:
        super().__init__(f"The {self.kind} {name!r} exists already; change it instead of creating it.")


class UserExists(_NameTaken):
    code, kind = "user_exists", "user"


class GroupExists(_NameTaken):
    code, kind = "group_exists", "group"


class SiloExists(_NameTaken):
    code, kind = "silo_exists", "silo"


class MembershipExists(Conflict):
    code = "membership_exists"

    def __init__(self, group_id: str, member: str) -> None:
        super().__init__(f"{member!r} is a member of group {group_id!r} already; nothing was added.")


class GroupCycle(Conflict):
    code = "group_cycle"

    def __init__(self, group_id: str, member: str) -> None:
        super().__init__(
            f"Group {member!r} cannot join group {group_id!r}, because {group_id!r} is inside {member!r} already."
        )


class GroupTooDeep(Conflict):
    code = "group_too_deep"

    def __init__(self, group_id: str, member: str, depth: int, limit: int) -> None:
        super().__init__(
            f"With group {member!r} inside {group_id!r} groups would nest {depth} deep, beyond the limit of {limit}."
        )


class GrantRevoked(Conflict):
    code = "grant_revoked"

    def __init__(self, grant_id: str) -> None:
        super().__init__(f"The grant {grant_id!r} was revoked before; nothing is left to revoke.")


class KeyAlreadyRevoked(Conflict):
    code = "key_already_revoked"

    def __init__(self, key_id: str) -> None:
        super().__init__(f"The key {key_id!r} was revoked before; create a new one.")


class UserNotActive(Conflict):
    code = "user_not_active"

    def __init__(self, user_id: str) -> None:
        super().__init__(f"The user {user_id!r} is disabled; enable the user first.")


class SiloStatusChanged(Conflict):
    code = "silo_status_changed"

    def __init__(self, silo_id: str, got: str, expected: str) -> None:
        super().__init__(
            f"The silo {silo_id!r} is {got}, not {expected} as this change expects; look again and decide anew."
        )


class OwnerUnknown(Conflict):
    code = "owner_unknown"

    def __init__(self, user_id: str, silo_id: str) -> None:
        super().__init__(f"The user {user_id!r} does not own the silo {silo_id!r}; nothing was changed.")


class OwnerRoleMissing(Conflict):
    code = "owner_role_missing"

    def __init__(self, user_id: str) -> None:
        super().__init__(f"The user {user_id!r} lacks the role silo_owner; give the role before the silo.")


class VersionMismatch(Conflict):
    """HTTP 412: the caller decided on an older state than the present one."""

    code = "version_mismatch"

    def __init__(self, got: int, expected: int) -> None:
        super().__init__(
            f"The policy is at version {got}, not {expected} as this change expects; look again and decide anew."
        )


class AlreadyInitialised(Conflict):
    code = "already_initialised"
    sentence = "This policy database has users already; init is for an empty one, use `seqr policy key create`."


class KeyUnknown(NotAuthenticated):
    code = "key_unknown"
    sentence = "The API key is not known here; check that it was copied whole and is meant for this service."


class KeyExpired(NotAuthenticated):
    code = "key_expired"
    sentence = "The API key has expired; ask an admin for a new one."


class KeyRevoked(NotAuthenticated):
    code = "key_revoked"
    sentence = "The API key has been revoked; ask an admin for a new one."


class UserDisabled(NotAuthenticated):
    code = "user_disabled"
    sentence = "The user of this API key is disabled; ask an admin."


class LoginNotAccepted(NotAuthenticated):
    """One error for users who are unknown, disabled or without a role that may chat: it tells nobody who exists."""

    code = "login_not_accepted"
    sentence = "You are not logged in as an active user who may ask this gateway; ask an admin."


class ScopeMissing(NotAllowed):
    code = "scope_missing"

    def __init__(self, needed: str) -> None:
        super().__init__(
            f"This API key does not carry the scope {needed!r} or its user's roles no longer allow it; ask an admin."
        )


class ScopeNotAllowed(NotAllowed):
    code = "scope_not_allowed"

    def __init__(self, scope: str, user_id: str, roles: Iterable[str]) -> None:
        held = ", ".join(sorted(roles)) or "none"
        super().__init__(
            f"The scope {scope!r} is more than the roles of user {user_id!r} ({held}) allow; ask for less."
        )


class NotSiloOwner(NotAllowed):
    code = "not_silo_owner"

    def __init__(self, actor: str, silo_id: str) -> None:
        super().__init__(f"Only an owner of the silo {silo_id!r} may set or lift its veto, and {actor!r} is none.")


class PepperInvalid(InvalidInput):
    code = "pepper_invalid"

    def __init__(self, problem: str) -> None:
        super().__init__(f"The pepper file {problem}; point to the file that `seqr policy init` made.")


class PepperMissing(InvalidInput):
    code = "pepper_missing"
    sentence = "API keys need the pepper; give --pepper-file or set SEQR_POLICY_PEPPER_FILE."


class DatabaseUrlInvalid(InvalidInput):
    """The URL itself is not repeated: it may hold a password."""

    code = "database_url_invalid"
    sentence = "The policy database URL is not usable; write sqlite:///FILE or postgresql://USER@HOST/NAME."


class DatabaseUrlMissing(InvalidInput):
    code = "database_url_missing"
    sentence = "No policy database is named; give --database or set SEQR_POLICY_DATABASE_URL."


class SchemaOutdated(Unavailable):
    code = "policy_schema_outdated"
    sentence = "The policy database has no schema or another one than this program; run `seqr policy upgrade`."


class PolicyBusy(Unavailable):
    code = "policy_busy"
    sentence = "Another change holds the policy database for too long; try again."


class DatabaseUnreachable(Unavailable):
    code = "policy_database_unreachable"
    sentence = "The policy database does not answer; check that it runs and that the URL is right."


class DatabaseDenied(Unavailable):
    code = "policy_database_denied"
    sentence = "The policy database does not let this role do that; docs/policy.md lists the rights each part needs."


class PolicyFileInvalid(InvalidInput):
    code = "policy_file_invalid"

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"The policy file is wrong at {where}: {problem}.")


class PolicyTestsFailed(Conflict):
    code = "policy_tests_failed"

    def __init__(self, failed: int, total: int) -> None:
        super().__init__(
            f"{failed} of {total} assertions do not hold; read the list above and correct the policy or the test."
        )


class HeadMalformed(InvalidInput):
    code = "head_malformed"

    def __init__(self, value: str) -> None:
        super().__init__(
            f"{value!r:.100} is no audit head; give SEQ:HASH as `seqr policy audit head` printed it, or a hash."
        )


class AuditBroken(Conflict):
    code = "audit_broken"

    def __init__(self, seq: int | None, problem: str) -> None:
        where = f"at row {seq}" if seq is not None else "as a whole"
        super().__init__(f"The audit log is not intact {where}: {problem}.")
