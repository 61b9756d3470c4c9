"""OpenID Connect as the routes use it: whose token this is, and the log-in of a browser."""

import ssl
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

from inference_gateway.errors import SettingsInvalid
from inference_gateway.oidc import tokens
from inference_gateway.oidc.errors import LoginDenied, LoginError, TokenInvalid
from inference_gateway.oidc.issuer import ERROR_CODE, Issuer
from inference_gateway.oidc.pending import PendingLogins
from inference_gateway.oidc.sessions import Sessions
from inference_gateway.oidc.settings import OidcSettings
from inference_gateway.settings import read_secret


class Oidc:
    """One gateway's log-ins. It finds out who somebody is; what they may do is the policy's, at every request anew."""

    def __init__(
        self,
        settings: OidcSettings,
        directory: Path,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ):
        """Files are relative to ``directory``. Raises SettingsInvalid for one that cannot be used."""
        self.settings = settings
        self.sessions = Sessions(settings.session_hours * 3600, clock)
        self._pending = PendingLogins(wall_clock)
        self._issuer = Issuer(settings, _secret(settings, directory), _tls(settings, directory), clock)

    async def aclose(self) -> None:
        await self._issuer.aclose()

    async def bearer(self, token: str) -> tuple[str, datetime | None]:
        """The user whom a bearer token names, and when it ends. Raises TokenInvalid, IssuerUnreachable."""
        claims = await self._verified(token, self.settings.audience or self.settings.client_id)
        return tokens.user_of(claims, self.settings.user_claim), tokens.end_of(claims)

    async def begin(self, session: str | None) -> tuple[str, str]:
        """The address to send the browser to, and the cookie that it must come back with. ``session``: the secret of
        the session that the browser has, which the new one takes the place of. Raises IssuerUnreachable.
        """
        metadata, settings = await self._issuer.metadata(), self.settings
        pending, cookie = self._pending.begin(self.sessions.name_of(session) if session else None)
        asked = {
            "response_type": "code",
            "client_id": settings.client_id,
            "redirect_uri": settings.redirect_uri,
            "scope": " ".join(settings.scopes),
            "state": pending.state,
            "nonce": pending.nonce,
            "code_challenge": pending.challenge,
            "code_challenge_method": "S256",
        }
        return str(httpx.URL(metadata.authorization_endpoint).copy_merge_params(asked)), cookie

    async def finish(self, answer: Mapping[str, str], cookie: str | None) -> tuple[str, str | None]:
        """The user who comes back with ``answer``, the parameters of the identity provider's redirect, and the name of
        the session that the browser had when it began.

        Raises LoginError, IssuerUnreachable.
        """
        pending = self._pending.finish(cookie, answer.get("state"))
        if answer.get("iss", self.settings.issuer) != self.settings.issuer:  # RFC 9207
            raise LoginError("the answer comes from another identity provider; log in again")
        if "error" in answer:
            code = answer["error"] if ERROR_CODE.fullmatch(answer["error"]) else "error"
            raise LoginDenied(f"the identity provider did not log you in ({code})")
        if not answer.get("code"):
            raise LoginError("the identity provider sent no code; log in again")
        token = await self._issuer.redeem(answer["code"], pending.verifier, self.settings.redirect_uri)
        claims = await self._verified(token, self.settings.client_id, pending.nonce)
        return tokens.user_of(claims, self.settings.user_claim), pending.replaces

    async def _verified(self, token: str, audience: str, nonce: str | None = None) -> dict[str, Any]:
        header = tokens.header_of(token, self.settings.algorithms)
        key = await self._issuer.key(header)
        if key is None:
            raise TokenInvalid("it is signed with a key that the identity provider does not have")
        return tokens.verify(token, key, self.settings, audience, nonce)


def _secret(settings: OidcSettings, directory: Path) -> str | None:
    if settings.client_secret_file is None:
        return None
    path = directory / settings.client_secret_file.expanduser()
    return read_secret(path, "oidc.client_secret_file", "the client's secret")


def _tls(settings: OidcSettings, directory: Path) -> ssl.SSLContext | bool:
    if settings.ca_file is None:
        return True
    path = directory / settings.ca_file.expanduser()
    try:
        return ssl.create_default_context(cafile=str(path))
    except (OSError, ssl.SSLError) as error:
        raise SettingsInvalid(f"oidc.ca_file {path} is not a certificate file: {error}") from None
