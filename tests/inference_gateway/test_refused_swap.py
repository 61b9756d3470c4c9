"""A silo's next revision fails intake while streams run: they go on with the revision they had."""

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from seqr.adapter import Adapter
from seqr.keys import SigningKey
from seqr.plan import Plan
from tests.inference_gateway.conftest import Running, World, wait_until
from tests.inference_gateway.fake_coordinator import FakeCoordinator, Revision
from tests.inference_gateway.support import random_adapter
from tests.inference_gateway.test_intake import nan_in_r

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "Where is the red boat?"}], "max_tokens": 24}


@pytest.fixture(scope="module")
def own(make_world: Callable[[Path], World], plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A gateway whose library these tests try to spoil; alice may use alpha, bob beta."""
    world = make_world(tmp_path_factory.mktemp("own") / "gateway")
    for seed, silo in enumerate(("alpha", "beta", "gamma", "nobody")):
        world.coordinator.stage(silo, 1, random_adapter(plan, seed))
    world.grant("alice", "alpha")
    world.grant("bob", "beta")
    server = Running(world).start()
    try:
        server.await_adapters("alpha", "beta", "gamma", "nobody")
        yield server
    finally:
        server.stop()


@dataclass
class Streams:
    """Users who ask the same again and again, streaming, until they are told to stop."""

    running: Running
    answers: list[tuple[str, str, Any]] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def ask(self, user: str) -> tuple[str, Any]:
        """(text, error) of one streamed answer."""
        body, text, error = BODY | {"stream": True}, "", None
        with self.running.http(user).stream("POST", "/v1/chat/completions", json=body) as response:
            for line in response.iter_lines():
                event = json.loads(line.removeprefix("data: ")) if line.startswith("data: {") else {}
                error = event.get("error", error)
                text += "".join(choice["delta"].get("content", "") for choice in event.get("choices", ()))
        return text, error

    def keep_asking(self, user: str) -> None:
        while not self.over.is_set():
            self.answers.append((user, *self.ask(user)))


def nan(coordinator: FakeCoordinator, adapter: Adapter, revision: int) -> Revision:
    return coordinator.stage("alpha", revision, nan_in_r(adapter))


def another_signer(coordinator: FakeCoordinator, adapter: Adapter, revision: int) -> Revision:
    return coordinator.stage("alpha", revision, adapter, signer=SigningKey.generate())


def changed_on_the_way(coordinator: FakeCoordinator, adapter: Adapter, revision: int) -> Revision:
    row = coordinator.stage("alpha", revision, adapter)
    row.blob = row.blob[:-1] + bytes([row.blob[-1] ^ 1])
    return row


def too_loud(coordinator: FakeCoordinator, _adapter: Adapter, revision: int) -> Revision:
    return coordinator.stage("alpha", revision, random_adapter(coordinator.plan, 9, strength=0.35 * 14))


Spoil = Callable[[FakeCoordinator, Adapter, int], Revision]
SPOILT: dict[str, Spoil] = {
    "not_finite": nan,
    "manifest_signature_invalid": another_signer,
    "bundle_digest_mismatch": changed_on_the_way,
    "norm_out_of_bounds": too_loud,
}


@pytest.mark.parametrize("code", SPOILT)
def test_a_swap_that_fails_intake_leaves_the_streams_and_the_old_adapter_alone(
    own: Running, plan: Plan, code: str
) -> None:
    streams = Streams(own)
    expected = {user: streams.ask(user) for user in ("alice", "bob")}
    assert expected["alice"][0] != expected["bob"][0]
    library = own.service.serving.engine.info().library_version
    threads = [threading.Thread(target=streams.keep_asking, args=(user,)) for user in ("alice", "bob") * 2]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: len(streams.answers) >= 4)
        row = SPOILT[code](own.world.coordinator, random_adapter(plan, 20), 2 + list(SPOILT).index(code))
        wait_until(lambda: row.verdict is not None)
        seen = len(streams.answers)
        wait_until(lambda: len(streams.answers) >= seen + 4)  # those that ran while the verdict was found
    finally:
        streams.over.set()
        for thread in threads:
            thread.join()
    assert row.verdict is not None and row.verdict[0] == code and row.state == "quarantined"
    assert {(text, error) for user, text, error in streams.answers if user == "alice"} == {expected["alice"]}
    assert {(text, error) for user, text, error in streams.answers if user == "bob"} == {expected["bob"]}
    assert own.service.serving.resident()["alpha"].revision == 1
    assert own.service.serving.engine.info().library_version == library
    assert own.world.coordinator.revisions["rev-alpha-1"].state == "active"
