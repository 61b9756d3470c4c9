"""All of the SuperLink that silos can reach: a TLS reverse proxy that knows ``POST /v1/fleet/<call>`` and nothing else.

Flower serves its admin, runtime and fleet interfaces on one port, and the first has no login. In front of it, this
proxy (or nginx, see docker/nginx.conf, which holds the same rule) answers 404 to everything that is not a fleet call.
"""

import argparse
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import httpx

from seqr.supervisor import follow_supervisor

# The raw path, before any decoding: no dots, no percent signs, no second slash can hide another path in it.
FLEET_PATH = re.compile(rb"/v1/fleet/[a-z]+(-[a-z]+)*")
# Flower sends arrays in chunks of 5 MiB; an erasure attestation travels whole.
BODY_LIMIT_BYTES = 16 * 1024 * 1024
HOP_BY_HOP = frozenset({b"connection", b"keep-alive", b"transfer-encoding", b"te", b"trailer", b"upgrade", b"host"})

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class FleetProxy:
    """An ASGI app that passes fleet calls to ``upstream`` ("https://host:port") unchanged, in both directions."""

    def __init__(self, upstream: str, ca_file: Path, transport: httpx.AsyncBaseTransport | None = None) -> None:
        verify = ssl.create_default_context(cafile=str(ca_file)) if transport is None else True
        # Idle connections are given up before the SuperLink closes them (after 5 s), which would lose a call.
        limits = httpx.Limits(keepalive_expiry=2.0)
        self._client = httpx.AsyncClient(
            base_url=upstream, verify=verify, transport=transport, timeout=60.0, limits=limits, trust_env=False
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] != "http":
            return
        elif scope["method"] != "POST" or scope["query_string"] or not FLEET_PATH.fullmatch(_raw_path(scope)):
            await _answer(send, 404)
        else:
            await self._forward(scope, receive, send)

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(name, value) for name, value in scope["headers"] if name.lower() not in HOP_BY_HOP]
        declared = dict(headers).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > BODY_LIMIT_BYTES:
            await _answer(send, 413)
            return
        try:
            body = await _read(receive)
        except BodyTooLong:
            await _answer(send, 413)
            return
        except ClientGone:
            return
        try:
            request = self._client.build_request("POST", _raw_path(scope).decode(), headers=headers, content=body)
            response = await self._client.send(request, stream=True)
        except httpx.TransportError:
            await _answer(send, 502)
            return
        try:
            kept = [(name, value) for name, value in response.headers.raw if name.lower() not in HOP_BY_HOP]
            await send({"type": "http.response.start", "status": response.status_code, "headers": kept})
            async for chunk in _chunks(response):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await response.aclose()

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                await self._client.aclose()
                await send({"type": "lifespan.shutdown.complete"})
                return


class BodyTooLong(Exception):
    """A body that outgrew its limit while it was read."""


class ClientGone(Exception):
    """The client hung up before its body was complete."""


async def _read(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body += message.get("body", b"")
        if len(body) > BODY_LIMIT_BYTES:
            raise BodyTooLong
        if not message.get("more_body", False):
            return bytes(body)


async def _chunks(response: httpx.Response) -> AsyncIterator[bytes]:
    # Raw: what the SuperLink compressed stays compressed, so that its content-length stays true.
    async for chunk in response.aiter_raw():
        if chunk:
            yield chunk


async def _answer(send: Send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


def _raw_path(scope: Scope) -> bytes:
    raw = scope.get("raw_path")
    return raw if isinstance(raw, bytes) else str(scope["path"]).encode()


def main(argv: list[str] | None = None) -> None:
    """``python -m coordinator.fleet_proxy --host --port --upstream --upstream-ca --certfile --keyfile``."""
    import uvicorn

    parser = argparse.ArgumentParser(description="Let silos reach /v1/fleet/ of a Flower SuperLink, and nothing else.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream", required=True, help="host:port of the SuperLink")
    parser.add_argument("--upstream-ca", type=Path, required=True)
    parser.add_argument("--certfile", type=Path, required=True)
    parser.add_argument("--keyfile", type=Path, required=True)
    options = parser.parse_args(argv)
    follow_supervisor()
    uvicorn.run(
        FleetProxy(f"https://{options.upstream}", options.upstream_ca),
        host=options.host,
        port=options.port,
        ssl_certfile=str(options.certfile),
        ssl_keyfile=str(options.keyfile),
        access_log=False,
        log_level="warning",
        server_header=False,
        # Longer than a SuperNode keeps an idle connection, for the same reason as above.
        timeout_keep_alive=30,
        limit_concurrency=1024,
    )


if __name__ == "__main__":
    main()
