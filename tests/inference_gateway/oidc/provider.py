"""A small OpenID provider with real keys: discovery, keys, the authorization code flow with PKCE. It asks nobody."""

import asyncio
import base64
import hashlib
import json
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlencode

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse

from tests.inference_gateway.playground.fake_gateway import Served

CLIENT = "seqr-gateway"


@dataclass(frozen=True)
class Signer:
    """A key pair of the provider."""

    kid: str
    algorithm: str
    private: Any

    @classmethod
    def generate(cls, kid: str, algorithm: str = "RS256", bits: int = 2048) -> "Signer":
        if algorithm.startswith("ES"):
            return cls(kid, algorithm, ec.generate_private_key(ec.SECP256R1()))
        if algorithm == "EdDSA":
            return cls(kid, algorithm, ed25519.Ed25519PrivateKey.generate())
        return cls(kid, algorithm, rsa.generate_private_key(65537, bits))

    @property
    def public(self) -> dict[str, Any]:
        """The public key as JSON Web Key."""
        made: dict[str, Any] = jwt.get_algorithm_by_name(self.algorithm).to_jwk(self.private.public_key(), as_dict=True)
        return made | {"kid": self.kid, "use": "sig"}


class Provider:
    """Signs in ``claims`` without asking. Whatever is not None in ``spoilt`` goes wrong."""

    def __init__(self) -> None:
        # While they are not set, discovery does not answer, or the exchange of codes.
        self.hold, self.exchange = threading.Event(), threading.Event()
        self.first = Signer.generate("first")
        self.signers = [self.first, Signer.generate("second", "ES256"), Signer.generate("third", "EdDSA")]
        self.app = FastAPI(openapi_url=None)
        self.app.get("/.well-known/openid-configuration")(self._discovery)
        self.app.get("/keys")(self._keys)
        self.app.get("/authorize")(self._authorize)
        self.app.post("/token")(self._token)
        self._served = Served(self.app)
        # Another site than 127.0.0.1, where the gateways of the tests are.
        self.issuer = self._served.url.replace("127.0.0.1", "localhost")
        self.reset()

    def reset(self) -> None:
        self.published = [signer.public for signer in self.signers]
        self.claims: dict[str, Any] = {"sub": "alice"}
        self.discovery: dict[str, Any] = {}
        self.keys_answer: Response | None = None
        self.token_answer: Response | None = None
        self.denied = ""
        self.secret: str | None = None
        self.asked: list[str] = []
        self.forms: list[dict[str, str]] = []
        self.hold.set()
        self.exchange.set()
        self._codes: dict[str, dict[str, str]] = {}

    def stop(self) -> None:
        self.hold.set()
        self.exchange.set()
        self._served.stop()

    def token(self, signer: Signer | None = None, header: Mapping[str, Any] | None = None, **claims: Any) -> str:
        """A token for the gateway. A claim that is None is left out."""
        by = signer or self.first
        now = int(time.time())
        all_claims = {"iss": self.issuer, "aud": CLIENT, "sub": "alice", "iat": now, "exp": now + 300} | claims
        present = {name: value for name, value in all_claims.items() if value is not None}
        return jwt.encode(present, by.private, by.algorithm, {"kid": by.kid} | dict(header or {}))

    async def _discovery(self) -> dict[str, Any]:
        self.asked.append("discovery")
        await asyncio.to_thread(self.hold.wait, 20)
        document = {
            "issuer": self.issuer,
            "authorization_endpoint": f"{self.issuer}/authorize",
            "token_endpoint": f"{self.issuer}/token",
            "jwks_uri": f"{self.issuer}/keys",
        }
        return document | self.discovery

    async def _keys(self) -> Response:
        self.asked.append("keys")
        return self.keys_answer or JSONResponse({"keys": self.published})

    async def _authorize(self, request: Request) -> Response:
        asked = dict(request.query_params)
        if "human" in self.claims:  # a page to click on, for the browser's tests
            address = f"/authorize?{urlencode(asked | {'approved': '1'})}"
            if "approved" not in asked:
                return HTMLResponse(f'<!doctype html><title>Sign in</title><a href="{address}">I am alice</a>')
        back = {"state": asked["state"]}
        if self.denied:
            back["error"] = self.denied
        else:
            back["code"] = secrets.token_urlsafe(16)
            self._codes[back["code"]] = asked
        return RedirectResponse(f"{asked['redirect_uri']}?{urlencode(back)}", 303)

    async def _token(self, request: Request) -> Response:
        form = dict(parse_qsl((await request.body()).decode()))
        self.forms.append(form)
        await asyncio.to_thread(self.exchange.wait, 20)
        if self.token_answer is not None:
            return self.token_answer
        asked = self._codes.pop(form.get("code", ""), None)
        digest = hashlib.sha256(form.get("code_verifier", "").encode()).digest()
        proven = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
        if asked is None or (asked["code_challenge"], asked["code_challenge_method"]) != (proven, "S256"):
            return JSONResponse({"error": "invalid_grant"}, 400)
        if form["redirect_uri"] != asked["redirect_uri"] or self._presented(request, form) != self.secret:
            return JSONResponse({"error": "invalid_client"}, 401)
        claims = {"nonce": asked["nonce"]} | {k: v for k, v in self.claims.items() if k != "human"}
        return JSONResponse({"id_token": self.token(**claims), "access_token": "opaque", "token_type": "Bearer"})

    def _presented(self, request: Request, form: Mapping[str, str]) -> str | None:
        scheme, _, value = request.headers.get("authorization", "").partition(" ")
        if scheme == "Basic":
            return base64.b64decode(value).decode().partition(":")[2]
        return form.get("client_secret")


def unsigned(header: Mapping[str, Any], claims: Mapping[str, Any], signature: bytes = b"") -> str:
    """A token put together by hand."""
    parts = [json.dumps(header).encode(), json.dumps(claims).encode(), signature]
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)
