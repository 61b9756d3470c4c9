"""How much a user, or one key, may ask of a gateway. A number that is not set here is the gateway's own default."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

from sqlalchemy import Connection, delete, insert, select, update

from policy.errors import KeyIdUnknown, LimitInvalid, LimitsNotSet, LimitSubjectMalformed, NoLimitGiven
from policy.ids import is_valid_id
from policy.models import ApiKey, UsageLimit
from policy.transaction import Change
from policy.users import require_user

LARGEST: Final = 2**53


@dataclass(frozen=True)
class Limits:
    """None stands for no limit, or, in a row of the database, for the gateway's default. Days end at midnight UTC."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    concurrent_requests: int | None = None

    def over(self, default: Limits) -> Limits:
        """These, and the default's where they say nothing."""
        return Limits(**{**asdict(default), **self.given()})

    def given(self) -> dict[str, int]:
        return {name: value for name, value in asdict(self).items() if value is not None}


NAMES: Final = tuple(asdict(Limits()))


def check_limits(limits: Limits) -> Limits:
    """Raises LimitInvalid unless every number that is given is from 1 to 2**53."""
    for name, value in limits.given().items():
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
            raise LimitInvalid(name, value)
    return limits


def set_limits(change: Change, subject: str, limits: Limits) -> None:
    """Sets the numbers that are given and leaves the others. `subject` is user:ID or key:ID.

    Raises NoLimitGiven, LimitInvalid, LimitSubjectMalformed, UserUnknown, KeyIdUnknown.
    """
    given = check_limits(limits).given()
    if not given:
        raise NoLimitGiven(NAMES)
    _require(change.connection, subject)
    before = _row(change.connection, subject)
    if before is None:
        change.connection.execute(insert(UsageLimit).values(subject=subject, **given))
    else:
        change.connection.execute(update(UsageLimit).where(UsageLimit.subject == subject).values(**given))
    change.record("limits.set", subject=subject, before=before.given() if before else {}, given=given)


def clear_limits(change: Change, subject: str) -> None:
    """The gateway's defaults count again. Raises LimitsNotSet."""
    _require(change.connection, subject)
    before = _row(change.connection, subject)
    if before is None:
        raise LimitsNotSet(subject)
    change.connection.execute(delete(UsageLimit).where(UsageLimit.subject == subject))
    change.record("limits.clear", subject=subject, before=before.given())


def pass_on(change: Change, key_id: str, new_key_id: str) -> None:
    """A key's successor has the key's limits: a rotation lifts none."""
    limits = _row(change.connection, f"key:{key_id}")
    if limits is not None:
        change.connection.execute(insert(UsageLimit).values(subject=f"key:{new_key_id}", **limits.given()))


def limits_of(connection: Connection, user_id: str, key_id: str | None) -> tuple[Limits, Limits]:
    """What is set for the user and for the key; nothing for the key of somebody who has none."""
    user, key = f"user:{user_id}", None if key_id is None else f"key:{key_id}"
    subjects = [user] if key is None else [user, key]
    query = select(UsageLimit.__table__).where(UsageLimit.subject.in_(subjects))
    found = {row["subject"]: _limits(row) for row in connection.execute(query).mappings()}
    return found.get(user, Limits()), found.get(key or "", Limits())


def _row(connection: Connection, subject: str) -> Limits | None:
    query = select(UsageLimit.__table__).where(UsageLimit.subject == subject)
    row = connection.execute(query).mappings().first()
    return None if row is None else _limits(row)


def _limits(row: Any) -> Limits:
    return Limits(**{name: row[name] for name in NAMES})


def _require(connection: Connection, subject: str) -> None:
    kind, _, name = subject.partition(":") if isinstance(subject, str) else ("", "", "")
    if kind not in ("user", "key") or not is_valid_id(name):
        raise LimitSubjectMalformed(subject)
    if kind == "user":
        require_user(connection, name)
    elif connection.execute(select(ApiKey.key_id).where(ApiKey.key_id == name)).first() is None:
        raise KeyIdUnknown(name)
