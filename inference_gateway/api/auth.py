"""Who is asking. Every route under /v1 depends on this."""

from dataclasses import replace
from datetime import datetime
from typing import Annotated

from fastapi import Depends, Header, Request
from fastapi.concurrency import run_in_threadpool

from inference_gateway import request_record
from inference_gateway.api.errors import CrossSiteRequest, KeyMissing
from inference_gateway.oidc.errors import SessionEnded
from inference_gateway.oidc.settings import OidcSettings
from inference_gateway.oidc.tokens import is_token
from inference_gateway.service import Service
from policy.keys import Principal

# The page sends this with the cookie of a log-in. No form can, and a script of another origin may not without asking.
PROOF = "X-Seqr-Session"


async def service_of(request: Request) -> Service:
    """The gateway this application serves."""
    service = request.app.state.service
    if not isinstance(service, Service):
        raise TypeError("the application was made without a Service")
    return service


async def authenticated(
    request: Request,
    service: Annotated[Service, Depends(service_of)],
    authorization: Annotated[str | None, Header()] = None,
) -> Principal:
    """Who may chat: the owner of a key, or the user whom a token or a log-in's cookie names.

    Raises KeyMissing, CrossSiteRequest, a LoginError, IssuerUnreachable, LoginNotAccepted, or what
    ``Permissions.authenticate`` raises.
    """
    oidc = service.oidc
    if oidc is not None and authorization is None and (cookie := session_cookie(request, oidc.settings)) is not None:
        require_own_page(request, oidc.settings)
        user_id = oidc.sessions.user_of(cookie)
        if user_id is None:
            raise SessionEnded("your log-in has ended; log in again")
        return await _logged_in(service, user_id, "session", login=oidc.sessions.name_of(cookie))
    presented = _bearer(authorization)
    if oidc is not None and is_token(presented):
        user_id, end = await oidc.bearer(presented)
        return await _logged_in(service, user_id, "token", expires_at=end)
    return await _owner(service, presented, "chat")


async def operator(
    service: Annotated[Service, Depends(service_of)], authorization: Annotated[str | None, Header()] = None
) -> Principal:
    """The owner of a key that may read metrics; else as for keys in ``authenticated``."""
    return await _owner(service, _bearer(authorization), "metrics")


def cookie_name(settings: OidcSettings, name: str) -> str:
    """Over TLS with the prefix that binds a cookie to this host alone (RFC 6265bis, section 4.1.3.2)."""
    return f"__Host-seqr-{name}" if settings.secure else f"seqr-{name}"


def session_cookie(request: Request, settings: OidcSettings) -> str | None:
    """The secret of the browser's session, if it sends one."""
    return sent_cookie(request, settings, "session")


def sent_cookie(request: Request, settings: OidcSettings, name: str) -> str | None:
    """The value of a cookie; None, too, where the browser sends any that is not printable ASCII.

    Starlette takes all that Python counts as white space off the names, so that a cookie which anybody may set, such
    as "\\xa0__Host-seqr-session", would be read as one that only this host can.
    """
    if not all(header.isascii() and header.isprintable() for header in request.headers.getlist("cookie")):
        return None
    return request.cookies.get(cookie_name(settings, name))


def require_own_page(request: Request, settings: OidcSettings) -> None:
    """Raises CrossSiteRequest unless this gateway's own page made the request, as far as the browser tells.

    Browsers set Origin and Sec-Fetch-Site themselves, and let no script change them.
    """
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    told = "same-origin" if site is None and origin is not None else site
    if PROOF not in request.headers or told != "same-origin" or origin not in (None, settings.origin):
        raise CrossSiteRequest(
            "a log-in's cookie counts only in requests of this gateway's own page; others need a key"
        )


def _bearer(authorization: str | None) -> str:
    scheme, _, presented = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not presented.strip():
        raise KeyMissing("this request has no API key; send the header Authorization: Bearer KEY")
    return presented.strip()


async def _owner(service: Service, presented: str, scope: str) -> Principal:
    principal = await run_in_threadpool(service.permissions.authenticate, presented, scope)
    request_record.current().fields |= {"user": principal.user_id, "key": principal.key_id or ""}
    return principal


async def _logged_in(
    service: Service, user_id: str, way: str, login: str | None = None, expires_at: datetime | None = None
) -> Principal:
    principal = await run_in_threadpool(service.permissions.logged_in, user_id)
    request_record.current().fields |= {"user": principal.user_id, "login": way}
    return replace(principal, login=login, expires_at=expires_at)


ServiceDep = Annotated[Service, Depends(service_of)]
Caller = Annotated[Principal, Depends(authenticated)]
Operator = Annotated[Principal, Depends(operator)]
