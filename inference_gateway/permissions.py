"""Who may use which silo, when a request begins and before every step after that."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import Engine

from inference_gateway.engine.base import Failed
from policy.decision import Decision
from policy.errors import NotAllowed, NotAuthenticated, PolicyError
from policy.keys import Principal
from policy.limits import Limits
from policy.reader import PolicyReader

REVOKED = Failed(
    "permission_revoked", "the permission for a silo that this answer may draw on has ended; ask again without it"
)
ENDED = Failed(
    "access_ended", "the key or the log-in that this answer was asked for with no longer counts; ask again with another"
)
UNREADABLE = Failed(
    "policy_unavailable", "the policy cannot be read, so nothing that depends on a permission can go on; try again"
)


@dataclass
class _Watched:
    caller: Principal
    silos: frozenset[str]
    decision: Decision
    # The policy version under which the caller was last looked at; None: not since the request came.
    version: int | None = None
    lost: Failed | None = None

    def caller_holds(self, version: int, at: datetime) -> bool:
        end = self.caller.expires_at
        return version == self.version and (end is None or at < end)


class Permissions:
    """Decides through the policy's reader, and tells the engine which requests have lost a silo, or the right to ask.

    That right is lost when the key is revoked or ends, the identity provider's token or the browser's log-in ends, the
    user is disabled, or key or roles no longer allow to chat.
    A request that is lost stays lost until it is over, even when the silo is granted again meanwhile: the engine may
    not have it in a batch yet. When the policy cannot be read, every request is lost.

    ``withdrawn`` reads over a connection of its own, so that the engine's steps never queue behind those who knock.
    """

    def __init__(
        self,
        database: Engine,
        pepper: bytes | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        login_holds: Callable[[str], bool] | None = None,
    ):
        """``login_holds``: whether the log-in that a ``Principal`` came by goes on, asked from any thread; none does
        where nobody can log in.
        """
        self._reader = PolicyReader(database, pepper)
        self._guards = PolicyReader(database)
        self._clock = clock
        self._login_holds = login_holds or (lambda _login: False)
        self._lock = threading.Lock()
        self._watched: dict[str, _Watched] = {}

    def close(self) -> None:
        """Give both connections back."""
        self._reader.close()
        self._guards.close()

    def authenticate(self, presented: str, scope: str = "chat") -> Principal:
        """Whose key this is. Raises KeyUnknown, KeyRevoked, KeyExpired, UserDisabled or ScopeMissing."""
        principal = self._reader.authenticate(presented, self._clock())
        principal.require(scope)
        return principal

    def logged_in(self, user_id: str) -> Principal:
        """The user whom the identity provider vouches for, who may chat and nothing else. Raises LoginNotAccepted."""
        return self._reader.logged_in(user_id)

    def decide(self, user_id: str) -> Decision:
        """The silos the user may use now; raises PolicyError when the policy cannot be read."""
        return self._reader.permitted(user_id, self._clock())

    def limits(self, principal: Principal) -> tuple[Limits, Limits]:
        """What the policy sets for the user and for the key; raises PolicyError when it cannot be read."""
        return self._reader.limits(principal.user_id, principal.key_id)

    @contextmanager
    def watching(self, request_id: str, caller: Principal, decision: Decision, silos: frozenset[str]) -> Iterator[None]:
        """While open, the request is withdrawn as soon as ``caller`` may not chat, or not use all of ``silos``."""
        with self._lock:
            self._watched[request_id] = _Watched(caller, silos, decision)
        try:
            yield
        finally:
            with self._lock:
                del self._watched[request_id]

    def lost(self, caller: Principal, decision: Decision, silos: frozenset[str]) -> Failed | None:
        """Why what was written under ``decision`` with ``silos`` must not be handed over now; None when it may."""
        one = _Watched(caller, silos, decision)
        try:
            self._refresh(self._reader, [one])
        except PolicyError:
            return UNREADABLE
        return one.lost

    def withdrawn(self) -> Mapping[str, Failed]:
        """The requests that must not go on, by id. Reads the policy version; decides anew only when it has to."""
        with self._lock:
            watched = dict(self._watched)
        try:
            self._refresh(self._guards, [one for one in watched.values() if one.lost is None])
        except PolicyError:
            for one in watched.values():
                one.lost = one.lost or UNREADABLE
        return {request_id: one.lost for request_id, one in watched.items() if one.lost is not None}

    def _refresh(self, reader: PolicyReader, watched: list[_Watched]) -> None:
        if not watched:
            return
        now, version = self._clock(), reader.version()
        decided: dict[str, Decision] = {}
        callers: dict[Principal, Principal | None] = {}
        for one in watched:
            user_id = one.caller.user_id
            if one.silos and not one.decision.still_holds(version, now):
                if user_id not in decided:
                    decided[user_id] = reader.permitted(user_id, now)
                one.decision = decided[user_id]
                if not one.silos <= set(one.decision.silos):
                    one.lost = REVOKED
            login = one.caller.login
            if one.lost is None and login is not None and not self._login_holds(login):
                one.lost = ENDED
            if one.lost is None and not one.caller_holds(version, now):
                if one.caller not in callers:
                    callers[one.caller] = _still(reader, one.caller, now)
                caller = callers[one.caller]
                if caller is None:
                    one.lost = ENDED
                else:
                    one.caller, one.version = caller, version


def _still(reader: PolicyReader, caller: Principal, now: datetime) -> Principal | None:
    """The caller as the policy has it now; None for one who may not chat any more."""
    try:
        present = reader.still(caller, now)
        present.require("chat")
    except (NotAuthenticated, NotAllowed):
        return None
    return present
