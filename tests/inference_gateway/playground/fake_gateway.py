"""A gateway without a model: the playground's own page, and a /v1 that answers what a test told it to."""

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from inference_gateway.api.errors import respond
from inference_gateway.playground import create_router
from tests.inference_gateway.conftest import wait_until

KEY = "seqr_fakefake_" + "k" * 43
VERSIONS = {"X-Seqr-Policy-Version": "41", "X-Seqr-Library-Version": "0123456789abcdef"}


@dataclass(frozen=True)
class Refusal:
    """An HTTP error in place of an answer."""

    status: int
    code: str
    message: str
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Script:
    """What a stream holds, (text, tokens or None) per chunk, and its end: "done", "cut", "hang" or an error code."""

    chunks: Sequence[tuple[str, list[dict[str, Any]] | None]]
    end: str = "done"
    # The stream as bytes, for whoever cares how it is cut; None stands for the plain way.
    raw: Sequence[bytes] | None = None


def token(text: str, silo: str | None, shares: Mapping[str, float], margin: float | None, number: int = 7) -> Any:
    return {"token": text, "id": number, "silo": silo, "shares": dict(shares), "margin": margin}


def words(text: str, silos: Sequence[str]) -> Script:
    """``text`` in tokens of one word each, shaped by ``silos`` in turn, every fifth by the base model alone."""
    chunks: list[tuple[str, list[dict[str, Any]] | None]] = []
    for index, word in enumerate(text.split(" ")):
        piece = word if index == 0 else f" {word}"
        if not silos or index % 5 == 4:
            chunks.append((piece, [token(piece, None, {}, None, index)]))
            continue
        first, second = silos[index % len(silos)], silos[(index + 1) % len(silos)]
        share = (0.9, 0.62, 0.41)[index % 3]
        shares = {first: share} | ({second: round((1 - share) / 2, 3)} if second != first else {})
        chunks.append((piece, [token(piece, first, shares, 1.7 if len(silos) > 1 else None, index)]))
    return Script(chunks)


class FakeGateway:
    """Answers each chat request with the next of ``refusals``, else with ``script``, else with the prompt's echo."""

    def __init__(self) -> None:
        self.silos = ["bank", "clinic", "school"]
        self.key = KEY
        self.refusals: list[Refusal] = []
        self.script: Script | None = None
        self.by_set: Callable[[Sequence[str]], Script] | None = None
        self.bodies: list[dict[str, Any]] = []
        self.keys_seen: set[str] = set()
        self.issuer: str | None = None
        self.left = threading.Event()
        self.app = FastAPI(openapi_url=None)
        self.app.include_router(create_router())
        self.app.get("/auth/session")(self._session)
        self.app.get("/v1/models")(self._models)
        self.app.post("/v1/chat/completions")(self._chat)

    def reset(self) -> None:
        self.silos, self.key, self.issuer = ["bank", "clinic", "school"], KEY, None
        self.refusals, self.bodies, self.script, self.by_set = [], [], None, None
        self.left.clear()

    async def _session(self) -> dict[str, Any]:
        return {"issuer": self.issuer, "session": False}

    def _refused(self, request: Request) -> Response | None:
        self.keys_seen.add(request.headers.get("authorization", ""))
        if request.headers.get("authorization") != f"Bearer {self.key}":
            return respond("this API key is unknown", "key_unknown", 401)
        return None

    async def _models(self, request: Request) -> Response:
        names = ["tiny", *(f"silo:{silo}" for silo in self.silos)]
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "seqr"} for name in names]
        return self._refused(request) or JSONResponse({"object": "list", "data": data})

    async def _chat(self, request: Request) -> Response:
        refused = self._refused(request)
        if refused is not None:
            return refused
        body = await request.json()
        self.bodies.append(body)
        if self.refusals:
            refusal = self.refusals.pop(0)
            return respond(refusal.message, refusal.code, refusal.status, headers=refusal.headers)
        chosen = body.get("seqr", {}).get("silos")
        silos = self.silos if chosen is None else chosen
        script = self.by_set(silos) if self.by_set else self.script or words(body["messages"][-1]["content"], silos)
        return StreamingResponse(self._stream(script, silos), media_type="text/event-stream", headers=VERSIONS)

    async def _stream(self, script: Script, silos: Sequence[str]) -> AsyncGenerator[bytes]:
        for piece in script.raw or ():
            yield piece
        if script.raw is not None:
            return
        try:
            yield event(choice({"role": "assistant", "content": ""}))
            for text, tokens in script.chunks:
                yield event(choice({"content": text}, tokens))
            if script.end == "hang":
                await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.left.set()
            raise
        if script.end == "done":
            shares = {silo: round(1 / len(silos), 3) for silo in silos}
            summary = {"permitted": list(silos), "routing": "prompt_evidence", "answer_shares": shares}
            yield event(choice({}, reason="stop") | {"seqr": summary})
            yield b"data: [DONE]\n\n"
        elif script.end != "cut":
            message = "the request ended because a silo it used was withdrawn"
            yield event({"error": {"message": message, "type": "permission_error", "param": None, "code": script.end}})
            yield b"data: [DONE]\n\n"


def choice(delta: Mapping[str, str], tokens: Any = None, reason: str | None = None) -> dict[str, Any]:
    one: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": reason}
    if tokens is not None:
        one["seqr"] = {"tokens": tokens}
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 0, "model": "tiny", "choices": [one]}


def event(body: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n".encode()


class Served:
    """An application under uvicorn in a thread."""

    def __init__(self, app: FastAPI):
        self._server = uvicorn.Server(
            uvicorn.Config(app, port=0, ws="none", log_config=None, timeout_graceful_shutdown=1)
        )
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        wait_until(lambda: self._server.started)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=20)
