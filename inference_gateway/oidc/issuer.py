"""The identity provider over HTTP: what it says about itself, its keys, and the exchange of a code for a token."""

import asyncio
import json
import logging
import re
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from urllib.parse import quote_plus

import httpx
import jwt

from inference_gateway.oidc.errors import IssuerUnreachable, LoginError
from inference_gateway.oidc.settings import OidcSettings
from inference_gateway.oidc.tokens import Header, find_key
from seqr.settings import is_safe_url

log = logging.getLogger(__name__)

T = TypeVar("T")

TIMEOUT_S = 10.0
MAX_BYTES = 256 * 1024
MAX_KEYS = 100
MAX_EXCHANGES = 8
# A document is asked for again after the first, and not used beyond the second, when the provider does not answer.
FRESH_S = 300.0
USABLE_S = 3600.0
# However many tokens name unknown keys, the provider is asked no more often than this.
PAUSE_S = 10.0
ERROR_CODE = re.compile(r"[a-z_]{1,40}", re.ASCII)


@dataclass(frozen=True)
class Metadata:
    """What discovery tells (OpenID Connect Discovery 1.0, section 3), as far as it is used here."""

    authorization_endpoint: str
    token_endpoint: str
    jwks_uri: str
    # Whether the client's secret goes into the Authorization header, which is the default, or into the form.
    basic: bool


class Kept(Generic[T]):
    """A document that is fetched when it is needed, kept, and fetched again when it is old or found wanting."""

    def __init__(self, fetch: Callable[[], Awaitable[T]], clock: Callable[[], float]):
        self._fetch = fetch
        self._clock = clock
        self._lock = asyncio.Lock()
        self._value: T | None = None
        self._fetched = self._tried = float("-inf")

    async def get(self, again: bool = False) -> T:
        """``again``: fetch it anew even if it is fresh. Raises IssuerUnreachable."""
        tried = self._tried
        # While somebody is asking already, nobody else waits for a document that is merely old.
        asking = self._lock.locked() and self._age() <= USABLE_S
        if again or (self._age() > FRESH_S and not asking):
            async with self._lock:
                if self._tried == tried and self._clock() - tried >= PAUSE_S:
                    await self._refresh()
        if self._value is None or self._age() > USABLE_S:
            raise IssuerUnreachable("the identity provider cannot be reached, so log-ins cannot be checked; try again")
        return self._value

    def _age(self) -> float:
        return self._clock() - self._fetched

    async def _refresh(self) -> None:
        self._tried = self._clock()
        try:
            self._value = await self._fetch()
            self._fetched = self._clock()
        except IssuerUnreachable as error:
            log.warning("%s", error)


class Issuer:
    """One identity provider. Redirects are not followed, and answers are bounded in time and size."""

    def __init__(
        self, settings: OidcSettings, secret: str | None, tls: ssl.SSLContext | bool, clock: Callable[[], float]
    ):
        self._settings = settings
        self._secret = secret
        # Anybody can come back with a code: exchanges are few at once and keep no documents from being fetched.
        self._documents, self._exchange = _client(tls), _client(tls)
        self._exchanges = asyncio.Semaphore(MAX_EXCHANGES)
        self._metadata = Kept(self._fetch_metadata, clock)
        self._keys = Kept(self._fetch_keys, clock)

    async def aclose(self) -> None:
        await self._documents.aclose()
        await self._exchange.aclose()

    async def metadata(self) -> Metadata:
        """Raises IssuerUnreachable."""
        return await self._metadata.get()

    async def key(self, header: Header) -> jwt.PyJWK | None:
        """The key that signed a token with this header, None when there is none. Raises IssuerUnreachable."""
        found = find_key(await self._keys.get(), header)
        return found or find_key(await self._keys.get(again=True), header)

    async def redeem(self, code: str, verifier: str, redirect_uri: str) -> str:
        """The ID token that a code stands for (RFC 6749, section 4.1.3; RFC 7636, section 4.5).

        Raises LoginError, IssuerUnreachable.
        """
        metadata, settings = await self.metadata(), self._settings
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": redirect_uri,
            "client_id": settings.client_id,
            "code_verifier": verifier,
        }
        auth = None
        if self._secret is not None and metadata.basic:  # both are form-encoded first: RFC 6749, section 2.3.1
            auth = httpx.BasicAuth(quote_plus(settings.client_id), quote_plus(self._secret))
        elif self._secret is not None:
            form["client_secret"] = self._secret
        status, answer = await self._exchanged(metadata.token_endpoint, form, auth)
        token = answer.get("id_token")
        if status != 200 or not isinstance(token, str):
            error = answer.get("error")
            named = f", {error}" if isinstance(error, str) and ERROR_CODE.fullmatch(error) else ""
            raise LoginError(
                f"the identity provider gave no ID token for its code (HTTP {status}{named}); log in again"
            )
        return token

    async def _exchanged(
        self, url: str, form: Mapping[str, str], auth: httpx.Auth | None
    ) -> tuple[int, dict[str, Any]]:
        """As ``_send``, after those before it."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._exchanges.acquire()
        except TimeoutError:
            raise IssuerUnreachable("too many log-ins wait for the identity provider; try again") from None
        try:
            return await self._send(self._exchange, "POST", url, form, auth)
        finally:
            self._exchanges.release()

    async def _fetch_metadata(self) -> Metadata:
        url = self._settings.issuer.rstrip("/") + "/.well-known/openid-configuration"
        told = await self._get(url)
        if told.get("issuer") != self._settings.issuer:
            raise IssuerUnreachable(f"the identity provider at {url} says that it is another issuer")

        def endpoint(name: str) -> str:
            value = told.get(name)
            if not isinstance(value, str) or not is_safe_url(value):
                raise IssuerUnreachable(f"the identity provider at {url} names no {name}, or one that is not https")
            return value

        methods = told.get("token_endpoint_auth_methods_supported")
        basic = not isinstance(methods, list) or "client_secret_basic" in methods
        return Metadata(endpoint("authorization_endpoint"), endpoint("token_endpoint"), endpoint("jwks_uri"), basic)

    async def _fetch_keys(self) -> Sequence[Mapping[str, Any]]:
        url = (await self.metadata()).jwks_uri
        keys = (await self._get(url)).get("keys")
        if not isinstance(keys, list):
            raise IssuerUnreachable(f"the identity provider's keys at {url} are no JSON Web Key Set")
        return [key for key in keys[:MAX_KEYS] if isinstance(key, dict)]

    async def _get(self, url: str) -> dict[str, Any]:
        status, told = await self._send(self._documents, "GET", url)
        if status != 200:
            raise IssuerUnreachable(f"the identity provider answered HTTP {status} at {url}")
        return told

    async def _send(
        self,
        http: httpx.AsyncClient,
        method: str,
        url: str,
        form: Mapping[str, str] | None = None,
        auth: httpx.Auth | None = None,
    ) -> tuple[int, dict[str, Any]]:
        """Status and JSON object of the answer; an answer that is no JSON object counts as an empty one."""
        body = bytearray()
        try:
            async with asyncio.timeout(TIMEOUT_S):
                async with http.stream(method, url, data=form, auth=auth) as response:
                    async for chunk in response.aiter_raw():
                        body += chunk
                        if len(body) > MAX_BYTES:
                            raise IssuerUnreachable(f"the answer of {url} is longer than {MAX_BYTES} bytes")
        except (httpx.HTTPError, TimeoutError) as error:
            raise IssuerUnreachable(f"{url} did not answer ({type(error).__name__})") from None
        try:
            told = json.loads(body)
        except (ValueError, RecursionError):
            told = None
        return response.status_code, told if isinstance(told, dict) else {}


def _client(tls: ssl.SSLContext | bool) -> httpx.AsyncClient:
    """Each request has its deadline; an answer that is not compressed cannot unpack to more than was sent."""
    return httpx.AsyncClient(
        timeout=TIMEOUT_S,
        verify=tls,
        follow_redirects=False,
        headers={"Accept": "application/json", "Accept-Encoding": "identity"},
    )
