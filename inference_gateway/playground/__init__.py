"""The playground: a page at / that talks to /v1 as any other client does, with a key that its user enters.

Or with the cookie of a log-in, see ``inference_gateway.api.login``. It is served to anybody and holds nothing about
users, silos or this gateway.
"""

import hashlib
from dataclasses import dataclass
from importlib.resources import files

from fastapi import APIRouter, HTTPException, Request, Response

# Everything comes from this gateway, nothing is inline, and no text can become markup (Trusted Types).
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
SECURITY_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), display-capture=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
PAGE = "index.html"


@dataclass(frozen=True)
class StaticFile:
    """One file of the page as it is sent."""

    body: bytes
    media_type: str
    etag: str


def read_static_files() -> dict[str, StaticFile]:
    """Every file of the page by its name. There are few and they are small: they are read once and kept."""
    found = {}
    for file in files(__name__).joinpath("static").iterdir():
        media_type = MEDIA_TYPES.get("." + file.name.rpartition(".")[2])
        if media_type is not None:
            body = file.read_bytes()
            found[file.name] = StaticFile(body, media_type, f'"{hashlib.sha256(body).hexdigest()[:32]}"')
    return found


def create_router() -> APIRouter:
    """GET / is the page, GET /playground/NAME what it loads; both need no key. Unknown names are 404."""
    router = APIRouter(include_in_schema=False)  # a page, no part of the API
    static = read_static_files()

    @router.api_route("/", methods=["GET", "HEAD"])
    async def page(request: Request) -> Response:
        return _send(static[PAGE], request)

    @router.api_route("/playground/{name}", methods=["GET", "HEAD"])
    async def asset(name: str, request: Request) -> Response:
        if name not in static or name == PAGE:
            raise HTTPException(404, "the playground has no such file")
        return _send(static[name], request)

    return router


def _send(file: StaticFile, request: Request) -> Response:
    # Asked for again at every visit, so that a new version of the gateway shows at once; unchanged files cost a 304.
    headers = SECURITY_HEADERS | {"Cache-Control": "no-cache", "ETag": file.etag}
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("If-None-Match", "").split(",")]
    if file.etag in known:
        return Response(status_code=304, headers=headers)
    return Response(file.body, media_type=file.media_type, headers=headers)
