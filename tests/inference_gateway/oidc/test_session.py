"""What a log-in's cookie is good for: requests of the gateway's own page, while the log-in lasts."""

import json
from pathlib import Path

import httpx
import pytest

from inference_gateway.api.openapi import schema
from inference_gateway.app import create_app
from inference_gateway.oidc.pending import PendingLogins
from inference_gateway.oidc.sessions import MAX_OF_ONE_USER, Sessions
from inference_gateway.service import Service
from policy.limits import Limits
from tests.inference_gateway.conftest import HOW, Running
from tests.inference_gateway.oidc.browser import OWN_PAGE, Browser
from tests.inference_gateway.oidc.conftest import Clock, Opening
from tests.inference_gateway.oidc.provider import Provider
from tests.inference_gateway.oidc.test_tokens import BODY
from tests.inference_gateway.support import run
from tests.inference_gateway.test_isolation_http import unguarded

CROSS_SITE = "a log-in's cookie counts only in requests of this gateway's own page; others need a key"


def error_of(response: httpx.Response) -> tuple[int, str, str]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["message"]


def test_the_cookie_is_good_at_every_route_that_takes_a_chat_key(house: Running) -> None:
    with Browser(house.url) as browser:
        browser.log_in()
        own = OWN_PAGE | {"Origin": house.url}
        assert browser.http.post("/v1/chat/completions", json=BODY, headers=own).status_code == 200
        assert browser.http.post("/tokenize", json={"prompt": "a"}, headers=own).status_code == 200
        with browser.http.stream("POST", "/v1/chat/completions", json=BODY | {"stream": True}, headers=own) as stream:
            assert stream.status_code == 200 and "data: [DONE]" in "".join(stream.iter_lines())
        assert error_of(browser.http.get("/metrics", headers=own))[:2] == (401, "key_missing")


FORGED = {
    "without the page's header": {"Sec-Fetch-Site": "same-origin"},
    "of another site": {"X-Seqr-Session": "1", "Sec-Fetch-Site": "cross-site"},
    "of a sister site": {"X-Seqr-Session": "1", "Sec-Fetch-Site": "same-site"},
    "typed by hand": {"X-Seqr-Session": "1", "Sec-Fetch-Site": "none"},
    "of another origin": {"X-Seqr-Session": "1", "Sec-Fetch-Site": "same-origin", "Origin": "https://evil.example"},
    "of no origin": {"X-Seqr-Session": "1", "Origin": "null"},
    "of a browser that tells nothing": {"X-Seqr-Session": "1"},
}


@pytest.mark.parametrize("name", FORGED)
def test_another_site_cannot_use_the_cookie(house: Running, name: str) -> None:
    with Browser(house.url) as browser:
        browser.log_in()
        assert error_of(browser.models(FORGED[name])) == (403, "cross_site_request", CROSS_SITE)
        asked = browser.http.post("/v1/chat/completions", json=BODY, headers=FORGED[name])
        assert error_of(asked) == (403, "cross_site_request", CROSS_SITE)
        left = browser.http.post("/auth/logout", headers=FORGED[name])
        assert error_of(left) == (403, "cross_site_request", CROSS_SITE)
        assert not browser.http.get("/auth/session", headers=FORGED[name]).json()["session"]
        assert browser.models().status_code == 200


def test_no_other_origin_may_ask_with_the_pages_header(house: Running) -> None:
    # A script of another origin has to ask first, and is told nothing that would let it.
    preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "GET"}
    asked = {"Access-Control-Request-Headers": "x-seqr-session"}
    with house.http() as http:
        response = http.request("OPTIONS", "/v1/models", headers=preflight | asked)
    assert response.status_code == 405
    assert not [name for name in response.headers if name.startswith("access-control-")]


def test_a_browser_that_knows_only_the_origin_may_use_the_cookie(house: Running) -> None:
    with Browser(house.url) as browser:
        assert browser.log_in().models({"X-Seqr-Session": "1", "Origin": house.url}).status_code == 200


def test_a_key_counts_and_not_the_cookie_beside_it(house: Running) -> None:
    with Browser(house.url) as browser:
        browser.log_in()
        bobs = {"Authorization": f"Bearer {house.world.keys['bob']}"}
        assert [entry["id"] for entry in browser.models(bobs).json()["data"]] == ["tiny"]
        assert error_of(browser.models(OWN_PAGE | {"Authorization": "Bearer wrong"}))[:2] == (401, "key_unknown")
        assert error_of(browser.models(OWN_PAGE | {"Authorization": "Basic x"}))[:2] == (401, "key_missing")


def test_a_user_who_is_disabled_after_the_log_in_is_out_at_the_next_request(house: Running, provider: Provider) -> None:
    house.world.policy.create_user("frank", **HOW)
    provider.claims = {"sub": "frank"}
    with Browser(house.url) as browser:
        assert browser.log_in().models().status_code == 200
        house.world.policy.disable_user("frank", **HOW)
        message = "You are not logged in as an active user who may ask this gateway; ask an admin."
        assert error_of(browser.models()) == (401, "login_not_accepted", message)
        assert browser.http.post("/auth/logout", headers=OWN_PAGE).status_code == 204


def test_a_grant_that_is_withdrawn_after_the_log_in_is_gone_at_the_next_request(
    house: Running, provider: Provider
) -> None:
    provider.claims = {"sub": "bob"}
    with Browser(house.url) as browser:
        browser.log_in()
        house.world.grant("bob", "alpha")
        assert [entry["id"] for entry in browser.models().json()["data"]] == ["tiny", "silo:alpha"]
        house.world.revoke("bob", "alpha")
        assert [entry["id"] for entry in browser.models().json()["data"]] == ["tiny"]


def test_a_session_ends_after_its_hours(house: Running, clock: Clock) -> None:
    with Browser(house.url) as browser:
        browser.log_in()
        clock.forward(8 * 3600 - 1)
        assert browser.models().status_code == 200
        clock.forward(2)
        assert error_of(browser.models()) == (401, "session_ended", "your log-in has ended; log in again")


def test_a_session_ends_at_the_log_out_even_for_who_kept_the_cookie(house: Running) -> None:
    with Browser(house.url) as browser, Browser(house.url) as other:
        other.log_in()
        secret = browser.log_in().session
        response = browser.http.post("/auth/logout", headers=OWN_PAGE)
        assert response.status_code == 204 and 'seqr-session=""' in response.headers["set-cookie"]
        assert error_of(browser.models())[:2] == (401, "key_missing")
        browser.http.cookies.set("seqr-session", secret)
        assert error_of(browser.models())[:2] == (401, "session_ended")
        assert other.models().status_code == 200


def test_a_second_log_in_of_a_browser_ends_its_first_session(house: Running) -> None:
    with Browser(house.url) as browser, Browser(house.url) as kept, Browser(house.url) as other:
        other.log_in()
        kept.http.cookies.set("seqr-session", browser.log_in().session)
        address = browser.begin()
        assert kept.models().status_code == 200  # until somebody is logged in
        strict = browser.http.cookies.get("seqr-session")
        browser.http.cookies.delete("seqr-session")  # which a browser does not send after a visit to another site
        assert browser.come_back(address) == "/" and browser.session != strict
        assert error_of(kept.models())[:2] == (401, "session_ended")
        assert browser.models().status_code == other.models().status_code == 200
        browser.http.post("/auth/logout", headers=OWN_PAGE)
        assert error_of(browser.models())[:2] == (401, "key_missing")


def test_a_log_in_that_fails_leaves_the_session_as_it_is(house: Running, provider: Provider) -> None:
    with Browser(house.url) as browser:
        browser.log_in()
        assert browser.come_back(browser.begin().partition("&code=")[0]) == "/#login=login_failed"
        assert browser.models().status_code == 200


def test_a_log_out_ends_what_is_being_written_for_its_session_and_nothing_else(house: Running) -> None:
    long = BODY | {"stream": True, "max_tokens": 400}
    with Browser(house.url) as browser, Browser(house.url) as other:
        own = OWN_PAGE | {"Origin": house.url}
        for one in (browser, other):
            one.log_in()
        with (
            browser.http.stream("POST", "/v1/chat/completions", json=long, headers=own) as ended,
            other.http.stream("POST", "/v1/chat/completions", json=long | {"max_tokens": 60}, headers=own) as whole,
        ):
            lines = (line.removeprefix("data: ") for line in ended.iter_lines() if line.startswith("data: "))
            for _ in range(3):
                next(lines)
            with httpx.Client(base_url=house.url) as tab:  # of the same browser
                cookie = f"seqr-session={browser.session}"
                assert tab.post("/auth/logout", headers=OWN_PAGE | {"Cookie": cookie}).status_code == 204
            last = json.loads([line for line in lines if line != "[DONE]"][-1])
            assert last["error"]["code"] == "access_ended"
            assert "data: [DONE]" in list(whole.iter_lines()) and whole.status_code == 200


def test_a_made_up_cookie_is_no_session(house: Running) -> None:
    with Browser(house.url) as browser:
        for made_up in ("x" * 43, "alice"):
            headers = OWN_PAGE | {"Cookie": f"seqr-session={made_up}"}
            response = browser.http.get("/v1/models", headers=headers)
            assert error_of(response)[:2] == (401, "session_ended")


@pytest.mark.parametrize("before", [b"\xa0", b"\x85", "é=1; ".encode()])
def test_a_cookie_that_only_looks_like_the_sessions_does_not_take_its_place(
    house: Running, provider: Provider, before: bytes
) -> None:
    provider.claims = {"sub": "bob"}
    with Browser(house.url) as browser, Browser(house.url) as other:
        planted = other.log_in().session.encode()
        provider.claims = {"sub": "alice"}
        own = browser.log_in().session.encode()
        browser.http.cookies.clear()
        headers = {name: value.encode() for name, value in OWN_PAGE.items()}
        headers["Cookie"] = b"seqr-session=" + own + b"; " + before + b"seqr-session=" + planted
        response = browser.http.get("/v1/models", headers=headers)
        assert error_of(response)[:2] == (401, "key_missing")
        assert not browser.http.get("/auth/session", headers=headers).json()["session"]


def test_the_users_limits_count_in_a_session_and_no_keys_do(house: Running, provider: Provider) -> None:
    house.world.policy.set_limits("user:carol", Limits(requests_per_minute=2), **HOW)
    provider.claims = {"sub": "carol"}
    with Browser(house.url) as browser:
        browser.log_in()
        asked = [browser.http.post("/v1/chat/completions", json=BODY, headers=OWN_PAGE) for _ in range(3)]
        assert [one.status_code for one in asked] == [200, 200, 429]
        assert asked[0].headers["x-ratelimit-limit-requests"] == "2"
        assert error_of(asked[2])[2].startswith("your limit of 2 requests per minute is reached")


def test_only_the_log_in_itself_needs_no_permission(house: Running) -> None:
    assert sorted(unguarded(house.app)) == ["/auth/callback", "/auth/login", "/auth/logout"]
    assert not [path for path in schema(house.app)["paths"] if path.startswith("/auth")]


def test_without_an_identity_provider_there_are_keys_only(house: Running, provider: Provider) -> None:
    settings = house.world.settings.model_copy(update={"oidc": None})
    app = create_app(Service(settings))

    async def asking() -> list[tuple[int, str]]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://gateway") as client:
            token = {"Authorization": f"Bearer {provider.token()}"}
            cookie = OWN_PAGE | {"Cookie": "seqr-session=x"}
            asked = [("/v1/models", token), ("/v1/models", cookie), ("/auth/login", {}), ("/auth/callback", {})]
            answers = [await client.get(path, headers=headers) for path, headers in asked]
            told = await client.get("/auth/session")
            assert told.json() == {"issuer": None, "session": False}
            return [(answer.status_code, answer.json()["error"]["code"]) for answer in answers]

    assert run(asking()) == [(401, "key_unknown"), (401, "key_missing"), (404, "http_404"), (404, "http_404")]


def test_a_restart_ends_sessions_and_log_ins(opening: Opening) -> None:
    async def asking() -> httpx.Response:
        async with opening() as client:
            return await client.get("/v1/models", headers=OWN_PAGE | {"Cookie": "__Host-seqr-session=" + "x" * 43})

    assert error_of(run(asking())) == (401, "session_ended", "your log-in has ended; log in again")


def test_sessions_are_bounded_per_user_and_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference_gateway.oidc.sessions.MAX_SESSIONS", 100)
    clock = Clock()
    sessions = Sessions(3600, clock)
    mine = [sessions.open("alice") for _ in range(MAX_OF_ONE_USER + 2)]
    assert [sessions.user_of(secret) for secret in mine] == [None, None] + ["alice"] * MAX_OF_ONE_USER
    first = sessions.open("bob")
    for number in range(100):
        sessions.open(f"user-{number}")
    assert sessions.user_of(first) is None and sessions.user_of(mine[-1]) is None
    assert len(vars(sessions)["_open"]) == 100
    clock.forward(3601)
    sessions.open("carol")
    assert len(vars(sessions)["_open"]) == 1


def test_what_is_kept_of_log_ins_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference_gateway.oidc.pending.MAX_USED", 3)
    clock = Clock()
    logins = PendingLogins(clock)
    for _ in range(5):
        pending, cookie = logins.begin()
        assert logins.finish(cookie, pending.state) == pending
    assert len(vars(logins)["_used"]) == 3


def test_no_secret_of_a_session_is_kept(tmp_path: Path) -> None:
    sessions = Sessions(3600)
    secret = sessions.open("alice")
    assert secret not in json.dumps(list(vars(sessions)["_open"]))
