"""The playground's log-in with an identity provider: /auth/login, /auth/callback, /auth/session and /auth/logout."""

import logging
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, RedirectResponse

from inference_gateway import request_record
from inference_gateway.api.auth import ServiceDep, cookie_name, require_own_page, sent_cookie, session_cookie
from inference_gateway.api.errors import CrossSiteRequest
from inference_gateway.oidc.errors import IssuerUnreachable, LoginError
from inference_gateway.oidc.login import Oidc
from inference_gateway.oidc.pending import LIFETIME_S
from policy.errors import PolicyError

log = logging.getLogger(__name__)

HEADERS = {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}


def create_router(oidc: Oidc | None) -> APIRouter:
    """The routes of the page's log-in. Without an identity provider the page is told that there is none."""
    router = APIRouter(prefix="/auth", include_in_schema=False)  # for browsers, no part of the API

    @router.get("/session")
    async def session(request: Request) -> JSONResponse:
        """How to log in, for anybody; and whether the page's browser is logged in."""
        told: dict[str, Any] = {"issuer": None, "session": False}
        if oidc is not None:
            told = {"issuer": oidc.settings.host, "session": _has_session(oidc, request)}
        return JSONResponse(told, headers=HEADERS)

    if oidc is None:
        return router
    settings = oidc.settings

    def to_page(problem: str | None = None) -> Response:
        address = settings.page if problem is None else f"{settings.page}#login={problem}"
        return RedirectResponse(address, 303, headers=HEADERS)

    def set_cookie(response: Response, name: str, value: str, seconds: float, same_site: Any) -> None:
        response.set_cookie(
            cookie_name(settings, name),
            value,
            max_age=int(seconds),
            path="/",
            secure=settings.secure,
            httponly=True,
            samesite=same_site,
        )

    @router.get("/login")
    async def login(request: Request) -> Response:
        """Sends the browser to the identity provider."""
        try:
            # The cookie is not sent to the callback, as SameSite=Strict: the log-in remembers its session till then.
            address, cookie = await oidc.begin(session_cookie(request, settings))
        except IssuerUnreachable as error:
            return to_page(_noted(error))
        response = RedirectResponse(address, 303, headers=HEADERS)
        # Lax: it must come along when the identity provider, another site, sends the browser back.
        set_cookie(response, "login", cookie, LIFETIME_S, "lax")
        return response

    @router.get("/callback")
    async def callback(request: Request, service: ServiceDep) -> Response:
        """Takes the identity provider's answer, once, and sends the browser to the page: logged in, or told why not."""
        cookie = sent_cookie(request, settings, "login")
        try:
            user_id, replaced = await oidc.finish(request.query_params, cookie)
            await run_in_threadpool(service.permissions.logged_in, user_id)
        except (LoginError, IssuerUnreachable, PolicyError) as error:
            response = to_page(_noted(error))
        else:
            request_record.current().fields["user"] = user_id
            response = to_page()
            secret = oidc.sessions.open(user_id, replaced)
            set_cookie(response, "session", secret, settings.session_hours * 3600, "strict")
        set_cookie(response, "login", "", 0, "lax")
        return response

    @router.post("/logout", status_code=204)
    async def logout(request: Request) -> Response:
        """Ends the session whose cookie this is, if there is one, whatever the policy says of its user by now."""
        require_own_page(request, settings)
        oidc.sessions.close(session_cookie(request, settings) or "")
        response = Response(status_code=204, headers=HEADERS)
        set_cookie(response, "session", "", 0, "strict")
        return response

    return router


def _has_session(oidc: Oidc, request: Request) -> bool:
    cookie = session_cookie(request, oidc.settings)
    try:
        require_own_page(request, oidc.settings)
    except CrossSiteRequest:
        return False
    return cookie is not None and oidc.sessions.user_of(cookie) is not None


def _noted(error: LoginError | IssuerUnreachable | PolicyError) -> str:
    """Logs why a log-in failed and returns the code by which the page explains it."""
    log.warning("a log-in failed: %s: %s", error.code, error)
    return error.code
