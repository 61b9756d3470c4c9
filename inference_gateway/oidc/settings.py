"""The table [oidc] of ``gateway.toml``."""

from pathlib import Path
from typing import Annotated, Literal

import httpx
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from seqr.settings import is_safe_url

# Signatures with a public key only. With "none" or HMAC on the list, whoever knows the public key could make tokens.
Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]


def _address(value: str) -> str:
    if not is_safe_url(value) or any(sign in value for sign in "?#@"):
        raise ValueError(
            "must be an https:// address without user, query and fragment (http:// only for this machine itself)"
        )
    return value


def _with_openid(scopes: tuple[str, ...]) -> tuple[str, ...]:
    if "openid" not in scopes or any(not scope or " " in scope for scope in scopes):
        raise ValueError('must be single words, and one of them "openid"')
    return scopes


class OidcSettings(BaseModel):
    """One identity provider, and this gateway as its client. ``issuer``, ``client_id`` and ``public_url`` must be set:
    a gateway that did not know whose tokens for whom it takes would take too many.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    # Compared byte by byte with the tokens' iss.
    issuer: Annotated[str, AfterValidator(_address)]
    client_id: str = Field(min_length=1)
    # Unset: a public client, with nothing but PKCE to show that it is the one that asked.
    client_secret_file: Path | None = None
    ca_file: Path | None = None
    # What bearer tokens must be meant for. Unset: the client id, which ID tokens always name.
    audience: str | None = Field(default=None, min_length=1)
    algorithms: tuple[Algorithm, ...] = Field(default=("RS256", "ES256", "EdDSA"), min_length=1)
    # The claim that is the user's id in the policy.
    user_claim: str = Field(default="sub", min_length=1)
    scopes: Annotated[tuple[str, ...], AfterValidator(_with_openid)] = ("openid",)
    # This gateway as browsers see it.
    public_url: Annotated[str, AfterValidator(_address)]
    session_hours: float = Field(default=8, gt=0, le=720)

    @property
    def host(self) -> str:
        """The issuer's host name, for people."""
        return httpx.URL(self.issuer).host

    @property
    def page(self) -> str:
        """The playground's address."""
        return self.public_url.rstrip("/") + "/"

    @property
    def redirect_uri(self) -> str:
        """Where the identity provider sends browsers back to; it must be registered there."""
        return self.page + "auth/callback"

    @property
    def origin(self) -> str:
        """The page's origin as browsers write it (RFC 6454, section 6.1)."""
        url = httpx.URL(self.public_url)  # it leaves out the scheme's own port and knows the host in lower case
        return f"{url.scheme}://{url.netloc.decode('ascii')}"

    @property
    def secure(self) -> bool:
        """Whether browsers reach the gateway over TLS."""
        return self.public_url.startswith("https://")
