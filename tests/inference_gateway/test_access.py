"""Keys, revocation and readiness through a running gateway."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from policy.db import create_engine_for
from policy.keys import load_pepper
from policy.store import PolicyStore
from seqr.plan import Plan
from tests.inference_gateway.conftest import HOW, Running, World, wait_until
from tests.inference_gateway.support import random_adapter

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "Where is the red boat?"}]}


@pytest.fixture(scope="module")
def own(make_world: Callable[[Path], World], plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A gateway whose policy and library these tests may change."""
    world = make_world(tmp_path_factory.mktemp("own") / "gateway")
    world.coordinator.stage("alpha", 1, random_adapter(plan, 0))
    world.coordinator.stage("beta", 1, random_adapter(plan, 1))
    server = Running(world).start()
    try:
        server.await_adapters("alpha", "beta")
        yield server
    finally:
        server.stop()


def code_of(own: Running, key: str) -> tuple[int, str]:
    headers = {"Authorization": f"Bearer {key}"}
    response = own.http().post("/v1/chat/completions", json=BODY | {"max_tokens": 1}, headers=headers)
    return response.status_code, response.json().get("error", {}).get("code", "")


def test_an_unknown_an_expired_and_a_revoked_key_are_told_apart(own: Running) -> None:
    store, settings = own.world.policy, own.world.settings
    assert code_of(own, "seqr_aaaaaaaa_" + "x" * 43) == (401, "key_unknown")
    assert code_of(own, "nonsense") == (401, "key_unknown")
    past = datetime.now(UTC) - timedelta(days=100)
    engine = create_engine_for(settings.policy_database_url)
    earlier = PolicyStore(engine, load_pepper(settings.policy_pepper_file), clock=lambda: past)
    assert code_of(own, earlier.create_key("alice", ["chat"], **HOW).secret) == (401, "key_expired")
    issued = store.create_key("alice", ["chat"], **HOW)
    assert code_of(own, issued.secret) == (200, "")
    store.revoke_key(issued.key_id, **HOW)
    assert code_of(own, issued.secret) == (401, "key_revoked")
    store.create_user("clerk", ["auditor"], **HOW)
    assert code_of(own, store.create_key("clerk", ["audit"], **HOW).secret) == (403, "scope_missing")


def test_a_grant_and_a_revocation_take_effect_at_the_next_request(own: Running) -> None:
    def permitted() -> list[str]:
        body = BODY | {"max_tokens": 1, "seqr": {"attribution": True}}
        return own.http("carol").post("/v1/chat/completions", json=body).json()["seqr"]["permitted"]

    assert permitted() == []
    own.world.grant("carol", "beta")
    assert permitted() == ["beta"]
    own.world.revoke("carol", "beta")
    assert permitted() == []


def long_stream(own: Running, user: str) -> Any:
    return own.http(user).stream("POST", "/v1/chat/completions", json=BODY | {"max_tokens": 400, "stream": True})


def events_of(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def test_a_revocation_cuts_a_running_stream_and_no_token_follows(own: Running) -> None:
    own.world.grant("alice", "alpha")
    with long_stream(own, "alice") as response:
        events = events_of(response)
        for _ in range(5):
            next(events)
        own.world.revoke("alice", "alpha")
        returned = own.service.serving.engine.info().generated_tokens
        rest = list(events)
    assert rest[-1]["error"]["code"] == "permission_revoked"
    # A step that had passed its last look at the policy when the revocation returned may still have handed out one.
    assert own.service.serving.engine.info().generated_tokens - returned <= 1


def test_the_openai_client_raises_on_an_event_that_is_an_error(own: Running) -> None:
    own.world.grant("alice", "alpha")
    chat = own.openai("alice").chat.completions
    stream = chat.create(**{**BODY, "max_tokens": 400, "stream": True})  # type: ignore[call-overload]
    next(stream)
    own.world.revoke("alice", "alpha")
    with pytest.raises(openai.APIError, match="permission"):
        list(stream)


def test_a_quarantined_silo_is_out_at_once_for_running_and_new_requests(own: Running) -> None:
    own.world.grant("bob", "beta")
    with long_stream(own, "bob") as response:
        events = events_of(response)
        next(events)
        own.world.policy.set_silo_status("beta", "quarantined", **HOW)
        assert list(events)[-1]["error"]["code"] == "permission_revoked"
    assert [m.id for m in own.openai("bob").models.list()] == ["tiny"]
    own.world.policy.set_silo_status("beta", "active", **HOW)
    own.world.revoke("bob", "beta")


@pytest.mark.parametrize("stream", [True, False])
def test_a_revoked_key_ends_the_answers_that_were_asked_for_with_it(own: Running, stream: bool) -> None:
    issued = own.world.policy.create_key("carol", ["chat"], **HOW)
    own.world.keys["carol's second"] = issued.secret
    body = BODY | {"max_tokens": 400, "stream": stream}
    ended: list[tuple[int, Any]] = []

    def ask() -> None:
        response = own.http("carol's second").post("/v1/chat/completions", json=body)
        ended.append((response.status_code, list(events_of(response))[-1] if stream else response.json()))

    thread = threading.Thread(target=ask)
    thread.start()
    before = own.service.serving.engine.info().generated_tokens
    wait_until(lambda: own.service.serving.engine.info().generated_tokens > before + 5)
    own.world.policy.revoke_key(issued.key_id, **HOW)
    thread.join()
    ((status, last),) = ended
    assert status == (200 if stream else 401)
    assert (last["error"]["code"], last["error"]["type"]) == ("access_ended", "authentication_error")
    assert last["error"]["message"] == (
        "the key or the log-in that this answer was asked for with no longer counts; ask again with another"
    )


def test_a_plain_answer_that_loses_its_silo_ends_with_403(own: Running) -> None:
    own.world.grant("bob", "beta")
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(own.http("bob").post("/v1/chat/completions", json=BODY | {"max_tokens": 400}))

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until(lambda: own.service.serving.engine.info().running > 0)
    own.world.revoke("bob", "beta")
    thread.join()
    assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (403, "permission_revoked")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request(own: Running, stream: bool) -> None:
    engine = own.service.serving.engine
    with httpx.Client(base_url=own.url, headers={"Authorization": f"Bearer {own.world.keys['carol']}"}) as client:
        if stream:
            body = BODY | {"max_tokens": 400, "stream": True}
            with client.stream("POST", "/v1/chat/completions", json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/chat/completions", json=BODY | {"max_tokens": 400}, timeout=0.2)
    wait_until(lambda: engine.info().running == 0, 2)


def test_a_new_revision_is_served_without_a_restart(own: Running, plan: Plan) -> None:
    own.world.grant("alice", "alpha")

    def answer() -> tuple[str, str]:
        response = own.http("alice").post("/v1/chat/completions", json=BODY | {"max_tokens": 8})
        return response.json()["choices"][0]["message"]["content"], response.headers["x-seqr-library-version"]

    def bystander() -> tuple[str, str]:
        response = own.http("bob").post("/v1/chat/completions", json=BODY | {"max_tokens": 8})
        return response.json()["choices"][0]["message"]["content"], response.headers["x-seqr-library-version"]

    own.world.grant("bob", "beta")
    untouched = bystander()
    before = answer()
    row = own.world.coordinator.stage("alpha", 2, random_adapter(plan, 7))
    wait_until(lambda: row.state == "active" and own.service.serving.resident()["alpha"].revision == 2)
    after = answer()
    assert after[0] != before[0] and after[1] != before[1]
    assert bystander() == untouched
    wait_until(lambda: own.world.coordinator.revisions["rev-alpha-1"].state == "destroyed")


def test_more_waiting_requests_than_allowed_get_503_at_once(
    make_world: Callable[[Path], World], tmp_path: Path
) -> None:
    world = make_world(tmp_path / "gateway")
    world.settings = world.settings.model_copy(update={"max_concurrent": 1, "max_waiting": 1})
    server = Running(world).start()
    try:
        server.await_adapters()
        long = BODY | {"max_tokens": 100}
        ask = lambda: server.http("carol").post("/v1/chat/completions", json=long)  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_until(lambda: server.service.admission.queue.waiting == 1)
        started = time.monotonic()
        refused = server.http("carol").post("/v1/chat/completions", json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert refused.headers["retry-after"] and time.monotonic() - started < 2
        for thread in threads:
            thread.join()
    finally:
        server.stop()


def test_a_gateway_without_its_coordinator_is_alive_but_not_ready(
    make_world: Callable[[Path], World], plan: Plan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world = make_world(tmp_path / "gateway")
    world.coordinator.down = True
    world.coordinator.stage("alpha", 1, random_adapter(plan, 0))
    server = Running(world).start()
    try:
        assert server.http().get("/healthz").status_code == 200
        ready = server.http().get("/readyz")
        assert ready.status_code == 503
        wait_until(lambda: any(record.message.startswith("the gateway waits: ") for record in caplog.records))
        # What the coordinator said is in the log, and not for callers without a key.
        assert server.http().get("/readyz").json()["reason"] == "it waits for the coordinator's plan"
        refused = server.http("alice").post("/v1/chat/completions", json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
        world.coordinator.down = False
        server.await_adapters("alpha")
        assert server.http().get("/readyz").status_code == 200
    finally:
        server.stop()
