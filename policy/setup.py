"""The first admin of an empty policy database."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from sqlalchemy import Engine, select

from policy import keys, users
from policy.errors import AlreadyInitialised
from policy.keys import IssuedKey, create_pepper, load_pepper
from policy.models import SCOPES, User
from policy.store import PolicyStore
from policy.times import Never
from policy.transaction import Change


def initialise(
    engine: Engine, pepper_file: Path, admin: str, expires_at: datetime | Never | None, *, actor: str
) -> IssuedKey:
    """Pepper, admin and the admin's key, in an order that lets a run that was cut short be repeated.

    Raises AlreadyInitialised for a database with users, PepperInvalid for a pepper file that is none.
    """
    store = PolicyStore(engine)
    with engine.connect() as connection:
        _require_empty(connection.execute(select(User.user_id).limit(1)).first() is None)
    pepper = load_pepper(pepper_file) if pepper_file.exists() else create_pepper(pepper_file)

    def first_admin(tx: Change) -> IssuedKey:
        _require_empty(tx.connection.execute(select(User.user_id).limit(1)).first() is None)
        users.create_user(tx, admin, ["admin"], "")
        scopes = [scope for scope in SCOPES if scope != "gateway"]
        return keys.create_key(tx, pepper, admin, scopes, expires_at)

    return store.write(first_admin, actor=actor, reason="first admin of a new policy")


def _require_empty(empty: bool) -> None:
    if not empty:
        raise AlreadyInitialised
