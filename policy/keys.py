"""API keys: 256 random bits, shown once, kept as HMAC-SHA256 under a pepper that is not in the database.

The text of a key never enters a message, a log or the audit; its prefix only finds the row.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import string
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, insert, select, update

from policy.errors import (
    KeyAlreadyRevoked,
    KeyExpired,
    KeyIdUnknown,
    KeyRevoked,
    KeyUnknown,
    LoginNotAccepted,
    PepperInvalid,
    ScopeMissing,
    ScopeNotAllowed,
    ScopeUnknown,
    UserDisabled,
    UserNotActive,
)
from policy.grants import end_of
from policy.ids import check_id, is_valid_id
from policy.limits import pass_on
from policy.models import SCOPES, ApiKey, User
from policy.times import DEFAULT_LIFETIME, MICROSECOND, Never, from_micros, iso, to_micros
from policy.transaction import Change
from policy.users import require_user, roles_of, user_status

PEPPER_BYTES: Final = 32
# Container engines mount secrets here, for the one user inside, as readable by all.
SECRETS_MOUNT: Final = Path("/run/secrets")
PATTERN: Final = re.compile(r"seqr_([a-z0-9]{8})_[A-Za-z0-9_-]{43}", re.ASCII)
_PREFIX_LETTERS: Final = string.ascii_lowercase + string.digits
_KEYS: Final = select(ApiKey.__table__, User.status).join(User, User.user_id == ApiKey.user_id)

# What a role's user may do with a key, at most. A key loses a scope at once when its user loses the role.
SCOPES_OF_ROLE: Final[dict[str, frozenset[str]]] = {
    "admin": frozenset(SCOPES),
    "privacy_officer": frozenset({"chat", "deletions", "audit"}),
    "auditor": frozenset({"audit"}),
    "analyst": frozenset({"chat"}),
    "silo_owner": frozenset({"chat", "deletions"}),
    "service": frozenset({"gateway", "chat", "metrics"}),
}


@dataclass(frozen=True)
class Principal:
    """Who presented a key. `scopes`: the key's scopes that the user's present roles still allow.

    `key_id` is None for somebody who logged in with an identity provider and has no key; `login` is then the browser's
    log-in by which they came, if they came by one: the gateway knows it. `expires_at`: when the key ends, unless
    it is revoked before, or the provider's token by which they came; None: it does not.
    """

    user_id: str
    key_id: str | None
    roles: frozenset[str]
    scopes: frozenset[str]
    expires_at: datetime | None = None
    login: str | None = None

    def require(self, scope: str) -> None:
        """Raises ScopeMissing."""
        if scope not in self.scopes:
            raise ScopeMissing(scope)


@dataclass(frozen=True)
class IssuedKey:
    """A new key; unpacks as (key_id, secret). `secret` exists only here: it is shown once and kept out of repr."""

    key_id: str
    secret: str = field(repr=False)
    policy_version: int

    def __iter__(self) -> Iterator[str]:
        return iter((self.key_id, self.secret))


def create_pepper(path: Path) -> bytes:
    """Writes 32 random bytes (hex, mode 0600) to a new file. Raises PepperInvalid where there is one already."""
    pepper = secrets.token_bytes(PEPPER_BYTES)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise PepperInvalid(f"{path} exists already and would make every key useless if replaced") from None
    except OSError as error:
        raise PepperInvalid(f"{path} cannot be written ({error.strerror})") from None
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(pepper.hex() + "\n")
        file.flush()
        os.fsync(file.fileno())
    return pepper


def load_pepper(path: Path) -> bytes:
    """Raises PepperInvalid for a file that is missing, unreadable, not 32 hex bytes, or readable by others."""
    try:
        readable_by_others = path.stat().st_mode & 0o007 and SECRETS_MOUNT not in path.absolute().parents
        content = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        raise PepperInvalid(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError):
        raise PepperInvalid(f"{path} cannot be read") from None
    if readable_by_others:
        raise PepperInvalid(f"{path} is open to everybody on this machine (chmod o-rwx it)")
    try:
        pepper = bytes.fromhex(content)
    except ValueError:
        raise PepperInvalid(f"{path} does not hold hexadecimal digits") from None
    if len(pepper) != PEPPER_BYTES:
        raise PepperInvalid(f"{path} holds {len(pepper)} bytes instead of {PEPPER_BYTES}")
    return pepper


def digest(pepper: bytes, secret: str) -> str:
    return hmac.new(pepper, secret.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def authenticate(connection: Connection, presented: str, at: datetime, *, pepper: bytes) -> Principal:
    """Whose key this is. Raises KeyUnknown; KeyRevoked, KeyExpired, UserDisabled only to whoever holds the true key.

    A wrong secret behind a known prefix and an unknown prefix cost the same: one HMAC and one comparison.
    """
    instant = to_micros(at, "time of the request")
    prefix = prefix_of(presented)
    key = connection.execute(_KEYS.where(ApiKey.prefix == prefix)).mappings().first()
    mine = digest(pepper, presented)
    if not hmac.compare_digest(mine, key["digest"] if key is not None else "0" * 64) or key is None:
        raise KeyUnknown
    return _owner(connection, key, instant)


def prefix_of(presented: str) -> str:
    """The part of a key that finds its row. Raises KeyUnknown for what has not a key's form, which is no secret."""
    match = PATTERN.fullmatch(presented) if isinstance(presented, str) else None
    if match is None:
        raise KeyUnknown
    return match[1]


def still(connection: Connection, caller: Principal, at: datetime) -> Principal:
    """The same caller as of `at`. Raises what `authenticate` or `logged_in` would raise now."""
    if caller.key_id is None:
        if caller.expires_at is not None and caller.expires_at <= at:
            raise LoginNotAccepted
        present = logged_in(connection, caller.user_id)
        return replace(present, login=caller.login, expires_at=caller.expires_at)
    key = connection.execute(_KEYS.where(ApiKey.key_id == caller.key_id)).mappings().first()
    if key is None:
        raise KeyUnknown
    return _owner(connection, key, to_micros(at, "time of the check"))


def _owner(connection: Connection, key: Any, instant: int) -> Principal:
    if key["revoked_at"] is not None:
        raise KeyRevoked
    if key["expires_at"] is not None and key["expires_at"] <= instant:
        raise KeyExpired
    if key["status"] != "active":
        raise UserDisabled
    roles = roles_of(connection, key["user_id"])
    scopes = frozenset(key["scopes"].split()) & allowed_scopes(roles)
    end = None if key["expires_at"] is None else from_micros(key["expires_at"])
    return Principal(key["user_id"], key["key_id"], roles, scopes, end)


def logged_in(connection: Connection, user_id: str) -> Principal:
    """The user whom an identity provider vouches for, with scope chat and no other. Raises LoginNotAccepted."""
    if not is_valid_id(user_id) or user_status(connection, user_id) != "active":
        raise LoginNotAccepted
    roles = roles_of(connection, user_id)
    if "chat" not in allowed_scopes(roles):
        raise LoginNotAccepted
    return Principal(user_id, None, roles, frozenset({"chat"}))


def allowed_scopes(roles: Iterable[str]) -> frozenset[str]:
    return frozenset().union(*(SCOPES_OF_ROLE[role] for role in roles))


def create_key(
    change: Change, pepper: bytes, user_id: str, scopes: Iterable[str], expires_at: datetime | Never | None
) -> IssuedKey:
    """A key that ends after 90 days unless said otherwise. Raises ScopeNotAllowed beyond the user's roles."""
    if require_user(change.connection, user_id) != "active":
        raise UserNotActive(user_id)
    wanted = sorted({scopes} if isinstance(scopes, str) else set(scopes))
    roles = roles_of(change.connection, user_id)
    for scope in wanted:
        if scope not in SCOPES:
            raise ScopeUnknown(scope, SCOPES)
        if scope not in allowed_scopes(roles):
            raise ScopeNotAllowed(scope, user_id, roles)
    end = end_of(expires_at, change.now, change.now + DEFAULT_LIFETIME // MICROSECOND)
    prefix = "".join(secrets.choice(_PREFIX_LETTERS) for _ in range(8))
    secret = f"seqr_{prefix}_{secrets.token_urlsafe(32)}"
    row: dict[str, Any] = {
        "key_id": f"key-{prefix}",
        "prefix": prefix,
        "digest": digest(pepper, secret),
        "user_id": user_id,
        "scopes": " ".join(wanted),
        "created_at": change.now,
        "expires_at": end,
    }
    change.connection.execute(insert(ApiKey).values(row))
    change.record("key.create", key_id=row["key_id"], user_id=user_id, scopes=wanted, expires_at=iso(end))
    return IssuedKey(row["key_id"], secret, change.version)


def revoke_key(change: Change, key_id: str) -> None:
    key = _require_key(change.connection, key_id)
    change.connection.execute(update(ApiKey).where(ApiKey.key_id == key_id).values(revoked_at=change.now))
    change.record("key.revoke", key_id=key_id, user_id=key["user_id"])


def rotate_key(
    change: Change, pepper: bytes, key_id: str, expires_at: datetime | Never | None, overlap: timedelta
) -> IssuedKey:
    """A new key with the same user, scopes and limits. The old one ends now, or after `overlap` if sooner."""
    key = _require_key(change.connection, key_id)
    issued = create_key(change, pepper, key["user_id"], key["scopes"].split(), expires_at)
    pass_on(change, key_id, issued.key_id)
    if overlap > timedelta(0):
        end = change.now + overlap // MICROSECOND
        end = end if key["expires_at"] is None else min(end, key["expires_at"])
        change.connection.execute(update(ApiKey).where(ApiKey.key_id == key_id).values(expires_at=end))
    else:
        end = change.now
        change.connection.execute(update(ApiKey).where(ApiKey.key_id == key_id).values(revoked_at=end))
    change.record("key.rotate", key_id=key_id, new_key_id=issued.key_id, old_ends_at=iso(end))
    return issued


def _require_key(connection: Connection, key_id: str) -> Any:
    query = select(ApiKey.__table__).where(ApiKey.key_id == check_id("key", key_id))
    key = connection.execute(query).mappings().first()
    if key is None:
        raise KeyIdUnknown(key_id)
    if key["revoked_at"] is not None:
        raise KeyAlreadyRevoked(key_id)
    return key
