"""PolicyReader: the policy as a service reads it, many times a second."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime
from types import TracebackType
from typing import Self, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from policy import decision, keys
from policy.decision import Decision
from policy.errors import DatabaseUnreachable, PepperMissing
from policy.keys import Principal
from policy.limits import Limits, limits_of
from policy.transaction import named_database_errors

T = TypeVar("T")


class PolicyReader:
    """Holds one connection in autocommit: no read transaction stays open, so each call sees the last committed change.

    Threads may share a reader; calls then queue. A lost connection is opened anew once, then DatabaseUnreachable:
    a caller that cannot read the policy must permit nothing.
    """

    def __init__(self, engine: Engine, pepper: bytes | None = None) -> None:
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._pepper = pepper
        self._lock = threading.Lock()
        self._connection: Connection | None = None

    def version(self) -> int:
        """The policy version, by one primary-key look-up."""
        return self._read(decision.policy_version)

    def permitted(self, user_id: str, at: datetime) -> Decision:
        return self._read(lambda connection: decision.permitted(connection, user_id, at))

    def authenticate(self, presented: str, at: datetime) -> Principal:
        """Raises KeyUnknown, KeyRevoked, KeyExpired, UserDisabled; PepperMissing for a reader made without one."""
        if self._pepper is None:
            raise PepperMissing
        pepper = self._pepper
        keys.prefix_of(presented)  # what is no key costs the database nothing
        return self._read(lambda connection: keys.authenticate(connection, presented, at, pepper=pepper))

    def still(self, caller: Principal, at: datetime) -> Principal:
        """The same caller as of `at`. Raises what `authenticate` or `logged_in` would raise now."""
        return self._read(lambda connection: keys.still(connection, caller, at))

    def logged_in(self, user_id: str) -> Principal:
        """The user whom an identity provider vouches for. Raises LoginNotAccepted."""
        return self._read(lambda connection: keys.logged_in(connection, user_id))

    def limits(self, user_id: str, key_id: str | None) -> tuple[Limits, Limits]:
        """What is set for the user and for the key; what is not set is the gateway's to say."""
        return self._read(lambda connection: limits_of(connection, user_id, key_id))

    def close(self) -> None:
        with self._lock:
            self._drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, query: Callable[[Connection], T]) -> T:
        with self._lock, named_database_errors():
            try:
                return query(self._open())
            except DBAPIError as error:
                if not error.connection_invalidated:
                    raise
            self._drop()
            try:
                return query(self._open())
            except DBAPIError as error:
                self._drop()
                raise DatabaseUnreachable from error

    def _open(self) -> Connection:
        if self._connection is None:
            self._connection = self._engine.connect()
        return self._connection

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
