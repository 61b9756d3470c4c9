"""The REST API as clients see it: who gets in, what they get, and how refusals look."""

import json
import logging
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient

from coordinator.api import create_app
from coordinator.api.auth import OPEN
from coordinator.db import now
from coordinator.plans import read_envelope
from policy.store import PolicyStore
from seqr.dsse import Envelope
from seqr.keys import SigningKey
from seqr.plan import sign_plan, verify_plan
from seqr.receipt import read_unverified
from tests.coordinator.world import HOW, Silo, World, digest_in


class Api:
    """A client that sends one key, or none."""

    def __init__(self, client: TestClient, key: str | None = None) -> None:
        self._client = client
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}

    def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self._client.request(method, path, json=body, headers={**self._headers, **named})


@pytest.fixture
def client(world: World) -> Iterator[TestClient]:
    with TestClient(create_app(world.c, world.nodes, with_loop=False), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def admin(world: World, client: TestClient) -> Api:
    return Api(client, world.key("ada", "admin", "deletions", "audit"))


@pytest.fixture
def officer(world: World, client: TestClient) -> Api:
    return Api(client, world.key("olga", "deletions"))


@pytest.fixture
def gateway(world: World, client: TestClient) -> Api:
    return Api(client, world.key("gw", "gateway"))


@pytest.fixture
def analyst(world: World, client: TestClient) -> Api:
    return Api(client, world.key("ann", "chat"))


@pytest.fixture
def anybody(client: TestClient) -> Api:
    return Api(client)


@pytest.fixture
def clinic(world: World) -> World:
    world.add_plan()
    world.add_silo("clinic")
    world.train("clinic")
    return world


def refused(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Checks that the answer is the problem document of this refusal."""
    assert response.headers["content-type"] == "application/problem+json", response.text
    body = response.json()
    assert (response.status_code, body["code"]) == (status, code), body
    assert body["type"] == f"urn:seqr:error:{code}" and body["status"] == status and body["detail"] and body["title"]
    return dict(body)


def routes(client: TestClient) -> dict[tuple[str, str], APIRoute]:
    """Every route by method and path, read from the app and not from its documentation, which could hide some."""
    found = {}
    for part in client.app.routes:  # type: ignore[attr-defined]
        router = getattr(part, "original_router", None)
        for route in [part] if router is None else router.routes:
            assert isinstance(route, APIRoute), route
            found |= {(method, route.path): route for method in route.methods}
    assert len(found) > 30
    return found


def scopes(route: APIRoute) -> set[str]:
    """The scopes of which a key must carry one, or "none"."""
    calls = [dependency.call for dependency in route.dependant.dependencies]
    return {scope for call in calls for scope in getattr(call, "scopes", ())} or {"none"}


def test_every_route_but_an_explicit_list_demands_a_key(client: TestClient, anybody: Api) -> None:
    guarded = [route for route in routes(client) if route not in OPEN]
    for method, path in guarded:
        refused(anybody(method, path.replace("{", "").replace("}", "")), 401, "key_missing")
    assert set(routes(client)) >= OPEN


def test_the_operators_page_lists_every_route_beside_a_scope_that_opens_it(client: TestClient) -> None:
    page = (Path(__file__).parents[2] / "docs" / "operator.md").read_text()
    part = page.partition("## The coordinator's REST API\n")[2].partition("\n## ")[0]
    listed = {}
    for line in part.splitlines():
        named = re.findall(r"`(GET|POST|PATCH|DELETE) (/[^`]+)`", line)
        listed |= {route: set(line.split("|")[1].strip().split(" or ")) for route in named}
    assert listed == {name: scopes(route) for name, route in routes(client).items()}


def test_an_analysts_key_opens_no_route_of_the_control_plane(client: TestClient, analyst: Api) -> None:
    for method, path in routes(client):
        if (method, path) not in OPEN:
            refused(analyst(method, path.replace("{", "").replace("}", "")), 403, "scope_missing")


def test_a_gateways_key_reaches_nothing_but_the_gateways_routes(client: TestClient, gateway: Api) -> None:
    for method, path in routes(client):
        if (method, path) not in OPEN and not path.startswith("/v1/gateway"):
            refused(gateway(method, path.replace("{", "").replace("}", "")), 403, "scope_missing")


def test_documentation_is_not_served_without_a_key(anybody: Api) -> None:
    for path in ("/docs", "/redoc", "/openapi.json", "/metrics"):
        refused(anybody("GET", path), 404, "not_found")


def test_each_way_a_key_can_be_wrong_has_its_own_code(world: World, client: TestClient) -> None:
    good = world.key("ada", "admin")
    world.store.revoke_key((revoked := world.store.create_key("ada", ["admin"], **HOW)).key_id, **HOW)
    hour, day = timedelta(hours=1), timedelta(days=1)
    expired = world.key("ada", "admin", expires_at=now() - hour, clock=lambda: now() - day)
    world.store.create_user("gone", ["admin"], **HOW)
    disabled = world.key("gone", "admin")
    world.store.disable_user("gone", **HOW)
    changed = good[:-1] + ("A" if good[-1] != "A" else "B")
    for key, code in (
        (changed, "key_unknown"),
        ("seqr_abcdefgh_" + "x" * 43, "key_unknown"),
        ("' OR 1=1 --", "key_unknown"),
        ("x" * 5000, "key_unknown"),
        (revoked.secret, "key_revoked"),
        (expired, "key_expired"),
        (disabled, "user_disabled"),
    ):
        response = Api(client, key)("GET", "/v1/silos")
        refused(response, 401, code)
        assert response.headers["www-authenticate"] == "Bearer"
        assert key not in response.text
    assert Api(client, good)("GET", "/v1/silos").status_code == 200
    for header in ("", "Bearer", "Bearer ", f"Basic {good}", good):
        refused(Api(client)("GET", "/v1/silos", Authorization=header), 401, "key_missing")


def test_a_key_loses_its_power_with_its_users_role(world: World, client: TestClient) -> None:
    key = world.key("ada", "admin")
    world.store.create_user("zoe", ["admin"], **HOW)
    world.store.set_roles("ada", ["analyst"], **HOW)
    refused(Api(client, key)("GET", "/v1/jobs"), 403, "scope_missing")


def test_a_silo_joins_is_approved_and_suspended(world: World, anybody: Api, admin: Api) -> None:
    silo = Silo("clinic")
    asked = silo.asks()
    body = {**asked.__dict__, "proof": json.loads(asked.proof)}
    answer = anybody("POST", "/v1/silos/enrolments", body)
    assert answer.status_code == 202 and answer.json()["fingerprint"] == silo.key.public.fingerprint
    assert [one["status"] for one in admin("GET", "/v1/silos").json()] == ["pending"]
    wrong = {"fingerprint": SigningKey.generate().public.fingerprint, "reason": "typo"}
    refused(admin("POST", "/v1/silos/clinic/approve", wrong), 409, "fingerprint_mismatch")
    right = {"fingerprint": silo.key.public.fingerprint, "reason": "read out on the phone"}
    assert admin("POST", "/v1/silos/clinic/approve", right).json()["node_registered"] is True
    assert world.nodes.keys == {silo.node_key: "clinic"}
    refused(anybody("POST", "/v1/silos/enrolments", body), 409, "silo_already_enrolled")
    world.nodes.down = True
    done = admin("POST", "/v1/silos/clinic/suspend", {"reason": "audit"}).json()
    assert (done["status"], done["node_registered"]) == ("suspended", False)
    assert world.policy_status("clinic") == "suspended"


def test_anybody_can_ask_but_only_so_often(world: World, client: TestClient, anybody: Api) -> None:
    small = world.c.settings.model_copy(update={"max_pending_enrolments": 1})
    object.__setattr__(world.c, "settings", small)
    for silo_id, status in (("a", 202), ("b", 429)):
        asked = Silo(silo_id).asks()
        body = {**asked.__dict__, "proof": json.loads(asked.proof)}
        assert anybody("POST", "/v1/silos/enrolments", body).status_code == status


def test_a_plan_is_stored_only_with_the_coordinators_signature(
    world: World, client: TestClient, admin: Api, anybody: Api
) -> None:
    refused(admin("GET", "/v1/plans/current"), 409, "plan_missing")
    plan = world.add_plan()
    forged = json.loads(sign_plan(plan, SigningKey.generate()).to_json())
    refused(admin("POST", "/v1/plans", forged), 422, "plan_signature_invalid")
    refused(admin("POST", "/v1/plans", {"not": "a plan"}), 422, "plan_unreadable")
    genuine = json.loads(sign_plan(plan, world.c.key).to_json())
    assert admin("POST", "/v1/plans", genuine).json() == {"plan_id": plan.plan_id, "current": True}
    for caller, path in ((admin, "/v1/plans/current"), (anybody, f"/v1/plans/{plan.plan_id}")):
        assert verify_plan(read_envelope(caller("GET", path).content), world.c.key.public) == plan
    refused(anybody("GET", "/v1/plans/plan-0"), 404, "plan_unknown")
    assert admin("GET", "/v1/plans").json()["current"] == plan.plan_id


def test_a_job_from_queue_to_active_revision_over_the_api(world: World, admin: Api, gateway: Api) -> None:
    world.add_plan()
    world.add_silo("clinic")
    made = admin("POST", "/v1/jobs", {"silo_id": "clinic", "kind": "train"})
    assert made.status_code == 202 and made.json()["state"] == "queued"
    assert "nonce" not in made.json()
    refused(admin("POST", "/v1/jobs", {"silo_id": "clinic", "kind": "ping"}), 409, "job_already_live")
    refused(admin("POST", "/v1/jobs", {"silo_id": "bank", "kind": "ping"}), 404, "silo_unknown")
    refused(admin("POST", "/v1/jobs", {"silo_id": "clinic", "kind": "erase"}), 422, "body_invalid")
    world.work()
    assert admin("GET", f"/v1/jobs/{made.json()['job_id']}").json()["state"] == "succeeded"
    staged = gateway("GET", "/v1/gateway/revisions").json()[0]
    path = f"/v1/gateway/revisions/{staged['revision_id']}"
    digest = digest_in(gateway("GET", f"{path}/bundle").content)
    refused(gateway("POST", f"{path}/admitted", {"adapter_digest": "x"}), 422, "digest_invalid")
    done = gateway("POST", f"{path}/admitted", {"adapter_digest": digest}).json()
    assert done == {"state": "active", "retired": []}
    assert [one["state"] for one in admin("GET", "/v1/revisions").json()] == ["active"]
    assert Envelope.from_json(gateway("GET", "/v1/gateway/plan").content).payload
    refused(gateway("POST", f"{path}/purged", {"acknowledgement": {}}), 409, "illegal_transition")
    refused(gateway("GET", "/v1/gateway/revisions/rev-0/bundle"), 404, "revision_unknown")


def test_a_deletion_over_the_api(clinic: World, client: TestClient, officer: Api, gateway: Api) -> None:
    body = {"silo_id": "clinic", "subject": "jane.doe", "requested_by": "Jane", "reason": "art. 17"}
    filed = officer("POST", "/v1/deletion-requests", body)
    assert filed.status_code == 201
    assert filed.json()["state"] == "quarantined" and "jane" not in filed.text.lower()
    assert clinic.permitted() == ()
    request_id = filed.json()["request_id"]
    refused(officer("GET", f"/v1/deletion-requests/{request_id}/receipt"), 404, "receipt_not_ready")
    assert officer("POST", "/v1/deletion-requests", body).json()["duplicate_of"] == request_id
    clinic.driver.tick()
    clinic.work()
    clinic.driver.tick()
    for one in gateway("GET", "/v1/gateway/revisions").json():
        if one["state"] == "staged":
            path = f"/v1/gateway/revisions/{one['revision_id']}"
            digest = digest_in(gateway("GET", f"{path}/bundle").content)
            old = gateway("POST", f"{path}/admitted", {"adapter_digest": digest}).json()["retired"]
    retired = next(one for one in gateway("GET", "/v1/gateway/revisions").json() if one["revision_id"] in old)
    sworn = {"acknowledgement": json.loads(clinic.gateways[0].acknowledge(retired))}
    purged = gateway("POST", f"/v1/gateway/revisions/{retired['revision_id']}/purged", sworn)
    assert purged.json() == {"state": "destroyed"}
    refused(gateway("GET", f"/v1/gateway/revisions/{retired['revision_id']}/bundle"), 410, "bundle_destroyed")
    clinic.driver.tick()
    shown = officer("GET", f"/v1/deletion-requests/{request_id}").json()
    assert shown["state"] == "certified" and shown["clock"]["running"] is False and shown["new_revision"] == 2
    assert [event["to_state"] for event in shown["history"]][-2:] == ["purged", "certified"]
    receipt = officer("GET", f"/v1/deletion-requests/{request_id}/receipt")
    assert read_unverified(Envelope.from_json(receipt.content)).request_id == request_id


def test_a_deletion_that_cannot_be_filed_changes_nothing(clinic: World, officer: Api) -> None:
    body = {"silo_id": "clinic", "subject": "jane.doe", "reason": "art. 17"}
    path = "/v1/deletion-requests"
    refused(officer("POST", path, {**body, "silo_id": "bank"}), 404, "silo_unknown")
    refused(officer("POST", path, {**body, "subject": ""}), 422, "subject_invalid")
    refused(officer("POST", path, {**body, "reason": "Jane.Doe asked"}), 422, "subject_in_reason")
    refused(officer("POST", path, {**body, "reason": "  "}), 422, "body_invalid")
    refused(officer("POST", path, {**body, "subjet": "x"}), 422, "body_invalid")
    unreadable = officer("POST", path, {**body, "subject": ["jane.doe"]})
    assert "jane" not in refused(unreadable, 422, "body_invalid")["detail"]
    refused(officer("GET", f"{path}/del-0"), 404, "deletion_request_unknown")
    refused(officer("POST", f"{path}/del-0/retry", {"reason": "x"}), 404, "deletion_request_unknown")
    assert officer("GET", path).json() == []
    assert clinic.permitted() == ("clinic",)


def test_an_owner_files_and_sees_requests_of_the_own_silo_only(clinic: World, client: TestClient, officer: Api) -> None:
    clinic.add_silo("bank")
    clinic.store.create_user("otto", ["silo_owner"], **HOW)
    clinic.store.add_silo_owner("clinic", "otto", **HOW)
    owner = Api(client, clinic.key("otto", "deletions"))
    body = {"silo_id": "clinic", "subject": "jane.doe", "reason": "art. 17"}
    mine = owner("POST", "/v1/deletion-requests", body).json()["request_id"]
    for silo_id in ("bank", "nowhere"):
        refused(owner("POST", "/v1/deletion-requests", {**body, "silo_id": silo_id}), 403, "not_your_silo")
    theirs = officer("POST", "/v1/deletion-requests", {**body, "silo_id": "bank"}).json()["request_id"]
    assert [one["request_id"] for one in owner("GET", "/v1/deletion-requests").json()] == [mine]
    for verb in ("", "/receipt"):
        refused(owner("GET", f"/v1/deletion-requests/{theirs}{verb}"), 403, "not_your_silo")
    refused(owner("POST", f"/v1/deletion-requests/{theirs}/withdraw", {"reason": "x"}), 403, "not_your_silo")
    assert clinic.permitted() == ()


def test_withdraw_and_retry_over_the_api(clinic: World, officer: Api) -> None:
    body = {"silo_id": "clinic", "subject": "jane.doe", "reason": "art. 17"}
    request_id = officer("POST", "/v1/deletion-requests", body).json()["request_id"]
    path = f"/v1/deletion-requests/{request_id}"
    refused(officer("POST", f"{path}/retry", {"reason": "x"}), 409, "illegal_transition")
    assert officer("POST", f"{path}/withdraw", {"reason": "x"}).json()["state"] == "withdrawn"
    refused(officer("POST", f"{path}/withdraw", {"reason": "x"}), 409, "illegal_transition")


def test_policy_writes_need_the_version_they_were_decided_on_and_a_reason(clinic: World, admin: Api) -> None:
    listed = admin("GET", "/v1/grants")
    etag = listed.headers["etag"]
    body = {"subject": "user:ann", "silo_id": "clinic", "effect": "deny", "reason": "left the project"}
    refused(admin("POST", "/v1/grants", body), 428, "precondition_required")
    refused(admin("POST", "/v1/grants", body, If_Match="17"), 422, "body_invalid")
    refused(admin("POST", "/v1/grants", body, If_Match='"1"'), 412, "version_mismatch")
    refused(admin("POST", "/v1/grants", {**body, "reason": ""}, If_Match="*"), 422, "body_invalid")
    refused(admin("POST", "/v1/grants", {**body, "silo_id": "bank"}, If_Match=etag), 404, "silo_unknown")
    preview = admin("POST", "/v1/grants?dry_run=true", body, If_Match=etag).json()
    assert preview["losses"] == {"ann": ["clinic"]} and clinic.permitted() == ("clinic",)
    made = admin("POST", "/v1/grants", body, If_Match=etag)
    assert made.status_code == 201 and made.headers["etag"] != etag
    assert clinic.permitted() == ()
    refused(admin("POST", "/v1/grants", body, If_Match=etag), 412, "version_mismatch")
    grant = f"/v1/grants/{made.json()['grant_id']}"
    assert admin("DELETE", grant, {"reason": "came back"}, If_Match="*").status_code == 200
    assert clinic.permitted() == ("clinic",)


def test_a_new_grant_is_answered_with_its_own_version_though_another_change_followed(
    clinic: World, admin: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the later version as ETag, the caller's next change would silently undo one it has not seen."""
    add_grant = PolicyStore.add_grant

    def overtaken(store: PolicyStore, *args: Any, **how: Any) -> Any:
        made = add_grant(store, *args, **how)
        store.create_user("late", **HOW)
        return made

    monkeypatch.setattr(PolicyStore, "add_grant", overtaken)
    before = clinic.store.version()
    body = {"subject": "user:ann", "silo_id": "clinic", "reason": "project"}
    made = admin("POST", "/v1/grants", body, If_Match="*")
    assert made.headers["etag"] == f'"{before + 1}"' and made.json()["policy_version"] == before + 1
    refused(admin("POST", "/v1/grants", body, If_Match=made.headers["etag"]), 412, "version_mismatch")


def test_users_groups_and_the_reasons_of_a_permission_over_the_api(clinic: World, admin: Api) -> None:
    how = {"If_Match": "*"}
    assert admin("POST", "/v1/users", {"user_id": "bob", "reason": "new"}, **how).status_code == 201
    refused(admin("POST", "/v1/users", {"user_id": "bob", "reason": "new"}, **how), 409, "user_exists")
    assert admin("POST", "/v1/groups", {"group_id": "staff", "reason": "new"}, **how).status_code == 201
    member = {"member": "user:bob", "reason": "joined"}
    assert admin("POST", "/v1/groups/staff/members", member, **how).status_code == 200
    grant = {"subject": "group:staff", "silo_id": "clinic", "expires_at": "2100-01-01T00:00:00Z", "reason": "project"}
    assert admin("POST", "/v1/grants", grant, **how).status_code == 201
    assert admin("GET", "/v1/users/bob/permitted").json()["silos"] == ["clinic"]
    explained = admin("GET", "/v1/users/bob/explain/clinic").json()
    assert explained["allowed"] and explained["path"][:2] == ["user:bob", "group:staff"]
    assert {one["user_id"] for one in admin("GET", "/v1/users").json()} >= {"ada", "bob"}
    assert admin("GET", "/v1/groups").json()[0]["members"] == ["user:bob"]
    changed = {"status": "disabled", "reason": "left"}
    assert admin("PATCH", "/v1/users/bob", changed, **how).status_code == 200
    assert admin("GET", "/v1/users/bob/permitted").json()["silos"] == []
    refused(admin("PATCH", "/v1/users/bob", {"reason": "nothing"}, **how), 422, "body_invalid")
    assert admin("PATCH", "/v1/users/bob", {"roles": ["auditor"], "reason": "moved"}, **how).status_code == 200
    gone = admin("DELETE", "/v1/groups/staff/members/user:bob", {"reason": "left"}, **how)
    assert gone.status_code == 200
    rows = admin("GET", "/v1/audit?limit=1000").json()
    assert rows[-1]["action"] == "group.remove_member" and rows[-1]["actor"] == "ada" and rows[-1]["reason"] == "left"
    assert admin("GET", "/v1/audit/head").json()["seq"] == rows[-1]["seq"]


def test_a_body_beyond_the_limit_is_refused_however_it_is_sent(world: World, client: TestClient, admin: Api) -> None:
    limit = world.settings.max_body_bytes
    refused(admin("POST", "/v1/jobs", {"silo_id": "x" * limit, "kind": "train"}), 413, "body_too_large")
    chunked = client.post("/v1/silos/enrolments", content=(b"x" * 65536 for _ in range(limit // 65536 + 2)))
    refused(chunked, 413, "body_too_large")
    refused(client.post("/v1/jobs", headers={"Content-Length": "-5"}, content=b""), 413, "body_too_large")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"silo_id": 1}', b"null", b"[" * 5000])
def test_a_body_that_cannot_be_read_is_a_problem_not_a_crash(world: World, client: TestClient, content: bytes) -> None:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {world.key('ada', 'admin')}"}
    refused(client.post("/v1/jobs", content=content, headers=headers), 422, "body_invalid")


def test_an_inside_error_shows_nothing_of_the_inside(
    world: World, client: TestClient, admin: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.job_queue.listing", lambda *_: 1 / 0)
    assert "zero" not in refused(admin("GET", "/v1/jobs"), 500, "internal_error")["detail"]


def test_requests_are_logged_without_keys_queries_bodies_or_subjects(
    clinic: World, client: TestClient, officer: Api, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    body = {
        "silo_id": "clinic",
        "subject": "canary.subject",
        "requested_by": "canary.person",
        "reason": "canary.reason",
    }
    answer = officer("POST", "/v1/deletion-requests?canary=query", body)
    officer("GET", "/v1/deletion-requests/canary.path")
    text = caplog.text + json.dumps([getattr(record, "fields", {}) for record in caplog.records])
    ours = "\n".join(line for line in text.splitlines() if "httpx" not in line)
    assert "canary" not in ours and "seqr_" not in ours
    line = next(record.fields for record in caplog.records if getattr(record, "fields", {}).get("status") == 201)
    assert line["route"] == "/v1/deletion-requests" and line["user"] == "olga"
    assert line["request_id"] == answer.headers["x-request-id"]


def test_health_says_yes_and_readiness_says_which_database_is_away(world: World, anybody: Api) -> None:
    assert anybody("GET", "/healthz").json() == {"status": "ok"}
    assert anybody("GET", "/readyz").json() == {"status": "ready"}
    with world.c.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE coordinator_version")
    refused(anybody("GET", "/readyz"), 503, "schema_outdated")


def test_the_loop_carries_a_request_forward_while_the_api_serves(clinic: World) -> None:
    key = clinic.key("olga", "deletions")
    with TestClient(create_app(clinic.c, clinic.nodes)) as client:
        officer = Api(client, key)
        body = {"silo_id": "clinic", "subject": "jane.doe", "reason": "art. 17"}
        path = f"/v1/deletion-requests/{officer('POST', '/v1/deletion-requests', body).json()['request_id']}"
        for _ in range(400):
            clinic.work()
            clinic.poll()
            if officer("GET", path).json()["state"] == "certified":
                return
    raise AssertionError(officer("GET", path).json())
