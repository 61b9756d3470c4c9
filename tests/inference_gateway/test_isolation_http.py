"""What a caller can learn over HTTP about silos that are not theirs: nothing. Attacks through a running gateway."""

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from fastapi.routing import RouteContext, iter_route_contexts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import event
from sqlalchemy.engine import Engine as Database

from inference_gateway.api import auth
from inference_gateway.api.openapi import schema
from inference_gateway.engine.base import GenerationRequest
from seqr.plan import Plan
from tests.inference_gateway.conftest import HOW, Running, World, wait_until
from tests.inference_gateway.support import random_adapter
from tests.inference_gateway.test_intake import nan_in_r

CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "Where is the red boat?"}], "max_tokens": 6}
SILOS = ("alpha", "beta", "gamma")
SUBSETS = [frozenset(chosen) for size in range(4) for chosen in combinations(SILOS, size)]
MODES = ("prompt_evidence", "evidence", "per_token")
# Routes that anybody may ask. They must say nothing about silos or users. A new one has to be added here by somebody.
PUBLIC = {"/healthz", "/readyz", "/", "/playground/{name}", "/auth/session"}
# What differs between any two answers.
PASSING = re.compile(r'"(id|created)":("[^"]*"|\d+)')


def member(silos: frozenset[str]) -> str:
    """The user who may use exactly these silos."""
    return "user-" + "".join(silo[0] for silo in sorted(silos))


@pytest.fixture(scope="module")
def house(
    make_world: Callable[[Path], World], plan: Plan, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """A gateway with three silos, a fourth that is quarantined, and one user for each set of the three."""
    world = make_world(tmp_path_factory.mktemp("house") / "gateway")
    for seed, silo in enumerate((*SILOS, "delta")):
        world.coordinator.stage(silo, 1, random_adapter(plan, seed))
    world.policy.add_silo("delta", **HOW)
    world.policy.set_silo_status("delta", "quarantined", **HOW)
    for silos in SUBSETS:
        user = member(silos)
        world.policy.create_user(user, **HOW)
        world.keys[user] = world.policy.create_key(user, ["chat"], **HOW).secret
        for silo in (*silos, "delta"):
            world.grant(user, silo)
    server = Running(world).start()
    try:
        server.await_adapters(*SILOS, "delta")
        yield server
    finally:
        server.stop()


def app_of(running: Running) -> FastAPI:
    app = running.server.config.app
    assert isinstance(app, FastAPI)
    return app


def body_routes(running: Running) -> dict[str, dict[str, Any]]:
    """Every route with a body: its path, and a small body that it accepts but for the model."""
    document = schema(app_of(running))
    bodies = {}
    for path, item in document["paths"].items():
        if "post" not in item:
            continue
        body = item["post"]["requestBody"]["content"]["application/json"]["schema"]
        body = body["anyOf"][0] if "anyOf" in body else body
        body = document["components"]["schemas"][body["$ref"].rpartition("/")[2]] if "$ref" in body else body
        fields = body["properties"]
        first = next(part for part in ("messages", "prompt", "tokens", "input") if part in fields)
        content: Any = {"messages": BODY["messages"], "tokens": [5, 6, 7]}.get(first, "Where is the red boat?")
        bodies[path] = {"model": "tiny", first: content} | ({"max_tokens": 4} if "max_tokens" in fields else {})
        bodies[path] |= {"seqr": {"silos": None}} if "seqr" in fields else {}
    return bodies


def named(body: Mapping[str, Any], silo: str) -> Iterator[dict[str, Any]]:
    """``body`` with a silo named wherever one can be."""
    yield {**body, "model": f"silo:{silo}"}
    if "seqr" in body:
        yield {**body, "seqr": {"silos": [silo]}}
        yield {**body, "seqr": {"silos": ["alpha", silo], "attribution": True}}
        yield {**body, "model": "silo:alpha", "seqr": {"silos": [silo]}}
        yield {**body, "seqr": {"silos": [silo]}, "stream": True}


def seen(response: httpx.Response, silo: str = "") -> tuple[int, str, list[tuple[str, str]]]:
    """All that a client sees, but for what is new in every answer and for the name that it asked for itself."""
    headers = [(name, value) for name, value in response.headers.multi_items() if name not in ("date", "x-request-id")]
    text = PASSING.sub("", response.text)
    return response.status_code, text.replace(silo, "X") if silo else text, headers


# Of the same length, so that even the length of the answers is the same.
STRANGERS = {"beta": "zeta", "delta": "dalta", "nobody": "anyone"}


@pytest.mark.parametrize("forbidden", STRANGERS, ids=["resident", "quarantined", "without an adapter"])
def test_a_forbidden_silo_looks_like_an_unknown_one_on_every_route(house: Running, forbidden: str) -> None:
    http = house.http(member(frozenset({"alpha"})))
    unknown = STRANGERS[forbidden]
    for path, body in body_routes(house).items():
        for real, invented in zip(named(body, forbidden), named(body, unknown), strict=True):
            told = seen(http.post(path, json=real), forbidden)
            assert told == seen(http.post(path, json=invented), unknown)
            assert told[0] == 404 and json.loads(told[1])["error"]["code"] == "model_not_found"
    told = seen(http.get(f"/v1/models/silo:{forbidden}"), forbidden)
    assert told == seen(http.get(f"/v1/models/silo:{unknown}"), unknown) and told[0] == 404


@contextmanager
def statements() -> Iterator[list[str]]:
    """What is asked of any database meanwhile."""
    asked: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        asked.append(statement)

    event.listen(Database, "before_cursor_execute", note)
    try:
        yield asked
    finally:
        event.remove(Database, "before_cursor_execute", note)


@pytest.mark.parametrize("forbidden", STRANGERS, ids=["resident", "quarantined", "without an adapter"])
def test_refusing_a_forbidden_silo_is_the_same_work_as_refusing_an_unknown_one(house: Running, forbidden: str) -> None:
    # The work decides the time and does not flicker; `seqr bench gateway` compares the times themselves.
    http, engine = house.http(member(frozenset({"alpha"}))), house.service.serving.engine

    def work(silo: str) -> list[tuple[list[str], int]]:
        done = []
        for body in named(BODY | {"seqr": {}}, silo):
            before = engine.info()
            with statements() as asked:
                assert http.post(CHAT, json=body).status_code == 404
            after = engine.info()
            assert (after.steps, after.waiting, after.running) == (before.steps, 0, 0)
            done.append((asked, len(asked)))
        return done

    work(forbidden)  # caches are warm for both
    known = work(forbidden)
    assert known == work(STRANGERS[forbidden])
    assert all(count > 0 for _, count in known)  # the policy was asked at all


def dependencies(route: RouteContext) -> Iterator[Any]:
    """Everything that runs before the route's own function."""
    dependant = getattr(route, "dependant", None)
    waiting = list(dependant.dependencies) if dependant is not None else []
    while waiting:
        one = waiting.pop()
        waiting.extend(one.dependencies)
        yield one.call


def unguarded(app: FastAPI) -> list[str]:
    """The routes that serve anybody without being on the list, or take a body from others than users who may chat."""
    found = []
    for route in iter_route_contexts(app.routes):
        calls = list(dependencies(route))
        of_auth = [call for call in calls if getattr(call, "__module__", "") == auth.__name__]
        keyed = any("authorization" in inspect.signature(call).parameters for call in of_auth)
        chats = auth.authenticated in calls
        if not (chats if "POST" in (route.methods or ()) else keyed or route.path in PUBLIC):
            found.append(str(route.path))
    return found


def test_every_route_but_the_public_ones_needs_a_key(house: Running) -> None:
    assert unguarded(app_of(house)) == []
    for route in iter_route_contexts(app_of(house).routes):
        for method in (route.methods or set()) - {"HEAD"}:
            path = str(route.path).replace("{name:path}", "silo:alpha").replace("{name}", "main.js")
            response = house.http().request(method, path, json=body_routes(house).get(path))
            if route.path in PUBLIC:
                assert response.status_code == 200 and not mentioned(re.findall(r"\w+", response.text))
            else:
                assert response.status_code == 401, path


def test_a_new_route_that_forgot_the_permission_dependency_is_found(house: Running) -> None:
    app, forgetful = FastAPI(openapi_url=None), APIRouter(prefix="/v1")
    app.router.routes.extend(app_of(house).router.routes)
    forgetful.add_api_route("/embeddings", lambda: None, methods=["POST"])
    forgetful.add_api_route("/usage", lambda: None, methods=["GET"])
    app.include_router(forgetful)
    app.mount("/files", FastAPI(openapi_url=None))
    assert unguarded(app) == ["/v1/embeddings", "/v1/usage", "/files"]


@contextmanager
def generations(running: Running, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[GenerationRequest]]:
    """What the engine is asked for meanwhile."""
    engine, asked = running.service.serving.engine, []
    generate = engine.generate

    def noted(request: GenerationRequest) -> Any:
        asked.append(request)
        return generate(request)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "generate", noted)
        yield asked


def test_every_route_hands_the_engine_the_callers_silos_and_watches_over_them(
    house: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched: dict[str, frozenset[str]] = {}
    watching = house.service.permissions.watching

    def noted(request_id: str, caller: Any, decision: Any, silos: frozenset[str]) -> Any:
        watched[request_id] = silos
        return watching(request_id, caller, decision, silos)

    monkeypatch.setattr(house.service.permissions, "watching", noted)
    reached = set()
    for path, body in body_routes(house).items():
        for silos in SUBSETS:
            with generations(house, monkeypatch) as asked:
                assert house.http(member(silos)).post(path, json=body).status_code == 200
            for request in asked:
                reached.add(path)
                assert {key.silo_id for key in request.adapters} == silos == watched[request.request_id]
    assert CHAT in reached


SOME_SILOS = st.lists(st.sampled_from((*SILOS, "delta", "nobody", "atlantis")), max_size=4)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    permitted=st.sampled_from(SUBSETS),
    wanted=st.none() | SOME_SILOS,
    model=st.sampled_from(("tiny", "silo:alpha", "silo:beta", "silo:atlantis")),
    mode=st.sampled_from(MODES),
    stream=st.booleans(),
)
def test_naming_silos_narrows_what_is_permitted_and_never_widens_it(
    house: Running,
    monkeypatch: pytest.MonkeyPatch,
    permitted: frozenset[str],
    wanted: list[str] | None,
    model: str,
    mode: str,
    stream: bool,
) -> None:
    options = {"attribution": True, "routing": mode, "silos": wanted}
    body = BODY | {"model": model, "max_tokens": 3, "stream": stream, "seqr": options}
    with generations(house, monkeypatch) as asked:
        response = house.http(member(permitted)).post(CHAT, json=body)
    named_silos = set(wanted or ()) | ({model.removeprefix("silo:")} if model != "tiny" else set())
    if not named_silos <= permitted:
        assert response.status_code == 404 and asked == []
        return
    expected = set(permitted) if wanted is None else set(wanted)
    expected &= {model.removeprefix("silo:")} if model != "tiny" else expected
    assert response.status_code == 200
    assert [{key.silo_id for key in request.adapters} for request in asked] == [expected]
    told = list(attributions(response))
    assert [set(one["permitted"]) for one in told if "permitted" in one] == [expected]
    assert mentioned(told) <= expected


def attributions(response: httpx.Response) -> Iterator[Any]:
    """Everything that an answer holds under the name ``seqr``, plain or streamed, at any depth."""
    lines = response.text.splitlines() if "event-stream" in response.headers["content-type"] else [response.text]
    waiting = [json.loads(line.removeprefix("data: ")) for line in lines if line and line != "data: [DONE]"][::-1]
    while waiting:
        one = waiting.pop()
        children = list(one.values()) if isinstance(one, dict) else one if isinstance(one, list) else []
        if isinstance(one, dict) and "seqr" in one:
            yield one["seqr"]
        waiting.extend(reversed(children))


def mentioned(value: Any) -> set[str]:
    """The silos of this house that occur anywhere in a JSON value, as a name or as a text."""
    if isinstance(value, Mapping):
        return mentioned(list(value.keys())) | mentioned(list(value.values()))
    if isinstance(value, list | tuple):
        return set().union(*map(mentioned, value)) if value else set()
    return {value} & {*SILOS, "delta", "nobody"} if isinstance(value, str) else set()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_attribution_names_permitted_silos_only(house: Running, mode: str, stream: bool) -> None:
    for permitted in SUBSETS:
        body = BODY | {"stream": stream, "seqr": {"attribution": True, "routing": mode}}
        response = house.http(member(permitted)).post(CHAT, json=body)
        told = list(attributions(response))
        assert told and mentioned(told) == permitted
        assert mentioned(list(response.headers.values())) == set()


def test_models_and_their_versions_are_those_of_the_permitted_silos_only(house: Running) -> None:
    versions = set()
    for permitted in SUBSETS:
        http = house.http(member(permitted))
        ids = {entry["id"] for entry in http.get("/v1/models").json()["data"]}
        assert ids == {"tiny"} | {f"silo:{silo}" for silo in permitted}
        versions.add(http.post(CHAT, json=BODY).headers["x-seqr-library-version"])
    assert len(versions) == len(SUBSETS)


def test_answers_headers_and_work_stay_the_same_to_the_byte_when_forbidden_silos_come_and_go(
    make_world: Callable[[Path], World], plan: Plan, tmp_path: Path
) -> None:
    world = make_world(tmp_path / "gateway")
    world.grant("alice", "alpha")
    world.grant("alice", "gamma")
    for seed, silo in enumerate(("alpha", "gamma")):
        world.coordinator.stage(silo, 1, random_adapter(plan, seed))
    server = Running(world).start()

    def everything() -> list[Any]:
        found: list[Any] = []
        engine, http = server.service.serving.engine, server.http("alice")
        for mode in MODES:
            for stream in (False, True):
                body = BODY | {"max_tokens": 12, "stream": stream, "seqr": {"attribution": True, "routing": mode}}
                before = engine.info()
                found.append(seen(http.post(CHAT, json=body)))
                after = engine.info()
                tokens = after.generated_tokens - before.generated_tokens
                found.append((after.steps - before.steps, after.prompt_tokens - before.prompt_tokens, tokens))
        return [*found, seen(http.get("/v1/models")), seen(http.get("/readyz")), seen(http.get("/v1/openapi.json"))]

    try:
        server.await_adapters("alpha", "gamma")
        alone = everything()
        assert alone == everything()
        others = [f"other{number:03d}" for number in range(63)]  # with the two, more than a block of 64
        for number, silo in enumerate(others):
            world.coordinator.stage(silo, 1, random_adapter(plan, 100 + number))
        bad = world.coordinator.stage("spoilt", 1, nan_in_r(random_adapter(plan, 99)))
        server.await_adapters("alpha", "gamma", *others)
        assert everything() == alone
        wait_until(lambda: bad.state == "quarantined")
        for silo in others:
            world.coordinator.revisions[f"rev-{silo}-1"].state = "retired"
        server.await_adapters("alpha", "gamma")
        assert everything() == alone
    finally:
        server.stop()
