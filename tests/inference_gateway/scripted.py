"""An engine that says what a test tells it to, to see what the API makes of it."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from inference_gateway.engine.base import EngineInfo, Event, Finished, GenerationRequest, Tokens
from tests.inference_gateway.conftest import Running

Script = Callable[[GenerationRequest], AsyncGenerator[Event]]


class ScriptedEngine:
    """The engine that a gateway has, but for ``generate``. ``running`` counts requests that have not ended."""

    def __init__(self, engine: Any, script: Script):
        self._engine = engine
        self._script = script
        self.running = 0
        self.requests: list[GenerationRequest] = []

    def info(self) -> EngineInfo:
        return self._engine.info()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        self.requests.append(request)
        self.running += 1
        try:
            async for event in self._script(request):
                yield event
        finally:
            self.running -= 1


@contextmanager
def scripted(running: Running, script: Script) -> Iterator[ScriptedEngine]:
    """``running`` with an engine that follows ``script``."""
    serving = running.service.serving
    engine = ScriptedEngine(serving.engine, script)
    running.service.instead = replace(serving, engine=engine)
    try:
        yield engine
    finally:
        running.service.instead = None


def says(running: Running, text: str, reason: str = "stop") -> Script:
    """A script that says ``text`` token by token."""
    ids = running.service.serving.tokenizer(text, add_special_tokens=False)["input_ids"]

    async def script(_request: GenerationRequest) -> AsyncGenerator[Event]:
        for token in ids:
            yield Tokens((token,))
            await asyncio.sleep(0)
        yield Finished(reason)

    return script
