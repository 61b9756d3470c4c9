"""Who is logged in with a cookie. The table lives in memory: a restart ends all sessions."""

import hashlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

MAX_SESSIONS = 10_000
MAX_OF_ONE_USER = 16


@dataclass(frozen=True)
class Session:
    """A user's, until ``ends`` on the table's clock."""

    user_id: str
    ends: float


class Sessions:
    """Sessions by the digest of their secret; beyond the bounds the oldest go. ``clock``: seconds, monotonic."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic):
        self._seconds = seconds
        self._clock = clock
        self._open: dict[str, Session] = {}

    def open(self, user_id: str, replaces: str | None = None) -> str:
        """A new session; returns its secret, 256 random bits, which is not kept. The one named ``replaces`` ends."""
        now = self._clock()
        self._open.pop(replaces or "", None)
        mine = [key for key, one in self._open.items() if one.user_id == user_id]
        for key in mine[: max(0, len(mine) + 1 - MAX_OF_ONE_USER)]:
            del self._open[key]
        for key, one in list(self._open.items()):  # in the order of their ends
            if one.ends > now and len(self._open) < MAX_SESSIONS:
                break
            del self._open[key]
        secret = secrets.token_urlsafe(32)
        self._open[_digest(secret)] = Session(user_id, now + self._seconds)
        return secret

    def user_of(self, secret: str) -> str | None:
        """Whose session this is; None when there is none, or none any more."""
        session = self._open.get(_digest(secret))
        return session.user_id if session is not None and session.ends > self._clock() else None

    def name_of(self, secret: str) -> str:
        """What ``holds`` knows the session by: its digest, which nobody can log in with."""
        return _digest(secret)

    def holds(self, name: str) -> bool:
        """Whether the session goes on. May be called from any thread."""
        session = self._open.get(name)
        return session is not None and session.ends > self._clock()

    def close(self, secret: str) -> None:
        """End the session, if it is there."""
        self._open.pop(_digest(secret), None)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
