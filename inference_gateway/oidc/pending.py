"""Log-ins that have been begun: sealed into a cookie of the browser that began them, so nothing is kept here but which
of them are used up.
"""

import hashlib
import hmac
import json
import secrets
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable
from dataclasses import dataclass

from cryptography.fernet import Fernet, InvalidToken

from inference_gateway.oidc.errors import LoginExpired

LIFETIME_S = 600
MAX_USED = 10_000


@dataclass(frozen=True)
class Pending:
    """What one log-in must come back with. ``verifier``: PKCE's secret (RFC 7636).

    ``replaces``: the name in ``Sessions`` of the browser's session so far, if it has one.
    """

    state: str
    nonce: str
    verifier: str
    replaces: str | None = None

    @property
    def challenge(self) -> str:
        """The verifier's S256 challenge (RFC 7636, section 4.2)."""
        digest = hashlib.sha256(self.verifier.encode("ascii")).digest()
        return urlsafe_b64encode(digest).rstrip(b"=").decode("ascii")


class PendingLogins:
    """Begins log-ins and finishes each once. The key lives as long as the process. ``clock`` is the wall clock, s."""

    def __init__(self, clock: Callable[[], float] = time.time):
        self._clock = clock
        self._box = Fernet(Fernet.generate_key())
        self._used: dict[str, float] = {}

    def begin(self, replaces: str | None = None) -> tuple[Pending, str]:
        """A new log-in, and the value of the cookie that binds it to a browser."""
        state, nonce, verifier = (secrets.token_urlsafe(32) for _ in range(3))
        pending = Pending(state, nonce, verifier, replaces)
        content = json.dumps([pending.state, pending.nonce, pending.verifier, pending.replaces]).encode()
        return pending, self._box.encrypt_at_time(content, int(self._clock())).decode("ascii")

    def finish(self, cookie: str | None, state: str | None) -> Pending:
        """Raises LoginExpired unless this browser began it, not long ago, and has not finished it before."""
        try:
            content = self._box.decrypt_at_time(cookie or "", LIFETIME_S, int(self._clock()))
        except InvalidToken:
            raise LoginExpired("this browser has not begun a log-in, or too long ago; log in again") from None
        pending = Pending(*json.loads(content))
        if not hmac.compare_digest(pending.state.encode(), (state or "").encode("utf-8", "surrogatepass")):
            raise LoginExpired("this answer belongs to another log-in than the last one begun here; log in again")
        if pending.state in self._used:
            raise LoginExpired("this log-in is used up; log in again")
        self._use_up(pending.state)
        return pending

    def _use_up(self, state: str) -> None:
        now = self._clock()
        for old, at in list(self._used.items()):  # in the order of their times
            if at + LIFETIME_S >= now and len(self._used) < MAX_USED:
                break
            del self._used[old]
        self._used[state] = now
