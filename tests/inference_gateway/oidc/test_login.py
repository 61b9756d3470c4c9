"""The log-in of a browser: there and back, once, by the one that began it."""

import base64
import hashlib
import logging
from typing import Any

import httpx
import pytest
from fastapi import Response
from fastapi.responses import JSONResponse

from tests.inference_gateway.conftest import HOW, Running, wait_until
from tests.inference_gateway.oidc.browser import OWN_PAGE, Browser, query
from tests.inference_gateway.oidc.conftest import Clock, Opening
from tests.inference_gateway.oidc.provider import CLIENT, Provider, Signer
from tests.inference_gateway.support import run

Log = pytest.LogCaptureFixture


def reason(log: Log) -> str:
    """Why the last log-in failed, as the log has it."""
    lines = [record.getMessage() for record in log.records if record.name == "inference_gateway.api.login"]
    return lines[-1].removeprefix("a log-in failed: ")


def test_whoever_logs_in_sees_what_they_may_use(house: Running, provider: Provider) -> None:
    with Browser(house.url) as browser:
        assert browser.http.get("/auth/session", headers=OWN_PAGE).json() == {"issuer": "localhost", "session": False}
        browser.log_in()
        assert browser.http.get("/auth/session", headers=OWN_PAGE).json() == {"issuer": "localhost", "session": True}
        assert [entry["id"] for entry in browser.models().json()["data"]] == ["tiny", "silo:alpha"]
    provider.claims = {"sub": "bob"}
    with Browser(house.url) as browser:
        assert [entry["id"] for entry in browser.log_in().models().json()["data"]] == ["tiny"]


def test_the_provider_is_asked_for_a_code_with_pkce_state_and_nonce(house: Running, provider: Provider) -> None:
    with Browser(house.url) as browser:
        first, second = (query(browser.http.get("/auth/login").headers["location"]) for _ in range(2))
        assert {name: first[name] for name in ("response_type", "client_id", "redirect_uri", "scope")} == {
            "response_type": "code",
            "client_id": CLIENT,
            "redirect_uri": f"{house.url}/auth/callback",
            "scope": "openid",
        }
        assert first["code_challenge_method"] == "S256"
        for name in ("state", "nonce", "code_challenge"):
            assert len(first[name]) == 43 and first[name] != second[name]
        assert len({first["state"], first["nonce"], first["code_challenge"]}) == 3
        browser.log_in()
    form = provider.forms[-1]
    assert set(form) == {"grant_type", "code", "redirect_uri", "client_id", "code_verifier"}
    assert len(base64.urlsafe_b64decode(form["code_verifier"] + "=")) == 32


def test_the_cookies_are_for_this_gateway_alone_and_say_nothing(house: Running) -> None:
    with Browser(house.url) as browser:
        begun = browser.http.get("/auth/login")
        login = begun.headers["set-cookie"]
        assert login.startswith("seqr-login=") and login.endswith("; HttpOnly; Max-Age=600; Path=/; SameSite=lax")
        state = query(begun.headers["location"])["state"]
        assert state not in login and "alice" not in login
        back = httpx.get(begun.headers["location"]).headers["location"]
        session, cleared = browser.http.get(back).headers.get_list("set-cookie")
        assert session.startswith("seqr-session=")
        assert session.endswith("; HttpOnly; Max-Age=28800; Path=/; SameSite=strict")
        assert cleared.startswith('seqr-login=""; ') and "Max-Age=0" in cleared
        assert len(browser.session) == 43
        assert hashlib.sha256(b"alice").hexdigest() not in session and "alice" not in session


def test_over_tls_the_cookies_are_bound_to_the_host_and_to_tls(opening: Opening) -> None:
    async def begun() -> httpx.Response:
        async with opening() as client:
            return await client.get("/auth/login")

    response = run(begun())
    cookie = response.headers["set-cookie"]
    assert cookie.startswith("__Host-seqr-login=") and "; Secure" in cookie and "domain" not in cookie.lower()
    assert query(response.headers["location"])["redirect_uri"] == "https://gateway.example/auth/callback"


def test_an_answer_counts_once(house: Running, caplog: Log) -> None:
    with Browser(house.url) as browser:
        begun = browser.begin()
        cookie = browser.http.cookies["seqr-login"]
        assert browser.come_back(begun) == "/"
        browser.http.cookies.clear()
        assert browser.come_back(begun) == "/#login=login_expired"
        assert reason(caplog) == ("login_expired: this browser has not begun a log-in, or too long ago; log in again")
        browser.http.cookies.set("seqr-login", cookie)  # even with the cookie that belongs to it
        assert browser.come_back(begun) == "/#login=login_expired"
        assert reason(caplog) == "login_expired: this log-in is used up; log in again"
        assert browser.session == ""


def test_an_answer_counts_only_in_the_browser_that_asked_for_it(house: Running, caplog: Log) -> None:
    with Browser(house.url) as mallory, Browser(house.url) as victim:
        planted = mallory.begin()
        assert victim.come_back(planted) == "/#login=login_expired"
        victim.begin()
        assert victim.come_back(planted) == "/#login=login_expired"
        assert reason(caplog) == (
            "login_expired: this answer belongs to another log-in than the last one begun here; log in again"
        )
        assert victim.session == ""


def test_an_answer_comes_too_late_after_ten_minutes(house: Running, clock: Clock) -> None:
    with Browser(house.url) as browser:
        begun = browser.begin()
        clock.forward(599)
        assert browser.come_back(begun) == "/"
        begun = browser.begin()
        clock.forward(602)
        assert browser.come_back(begun) == "/#login=login_expired"


def test_a_cookie_that_the_gateway_did_not_make_begins_nothing(house: Running, caplog: Log) -> None:
    with Browser(house.url) as browser:
        begun = browser.begin()
        cookie = browser.http.cookies["seqr-login"]
        for forged in (cookie[:-8] + "AAAAAAA=", "AAAA", "%", "x" * 2000):
            browser.http.cookies.clear()
            browser.http.cookies.set("seqr-login", forged)
            assert browser.come_back(begun) == "/#login=login_expired"


def test_a_cookie_that_is_no_text_begins_nothing(house: Running) -> None:
    with Browser(house.url) as browser:
        begun = browser.begin()
        cookie = browser.http.cookies["seqr-login"].encode()
        browser.http.cookies.clear()
        for forged in (b"\xe9", "é".encode(), cookie + b"\xa0", cookie + b"; \x85seqr-login=" + cookie):
            response = browser.http.get(begun, headers={"Cookie": b"seqr-login=" + forged})
            assert response.headers["location"] == f"{house.url}/#login=login_expired"


PROBLEMS: dict[str, tuple[dict[str, Any], str]] = {
    "a nonce of another log-in": (
        {"claims": {"sub": "alice", "nonce": "of-another"}},
        "token_invalid: the token is not accepted: it belongs to another log-in (nonce); "
        "log in again with the identity provider",
    ),
    "no nonce": (
        {"claims": {"sub": "alice", "nonce": None}},
        "token_invalid: the token is not accepted: it belongs to another log-in (nonce); "
        "log in again with the identity provider",
    ),
    "a token for another client": (
        {"claims": {"sub": "alice", "aud": "wiki"}},
        "token_invalid: the token is not accepted: it was issued for somebody else than this gateway; "
        "log in again with the identity provider",
    ),
    "an unknown user": (
        {"claims": {"sub": "nobody-knows"}},
        "login_not_accepted: You are not logged in as an active user who may ask this gateway; ask an admin.",
    ),
    "a disabled user": (
        {"claims": {"sub": "dora"}},
        "login_not_accepted: You are not logged in as an active user who may ask this gateway; ask an admin.",
    ),
    "a refusal": (
        {"denied": "access_denied"},
        "login_denied: the identity provider did not log you in (access_denied)",
    ),
    "a refusal in strange words": (
        {"denied": "<script>\n"},
        "login_denied: the identity provider did not log you in (error)",
    ),
    "a code that does not count": (
        {"token_answer": JSONResponse({"error": "invalid_grant"}, 400)},
        "login_failed: the identity provider gave no ID token for its code (HTTP 400, invalid_grant); log in again",
    ),
    "an answer without an ID token": (
        {"token_answer": JSONResponse({"access_token": "x"})},
        "login_failed: the identity provider gave no ID token for its code (HTTP 200); log in again",
    ),
    "an answer that is none": (
        {"token_answer": Response("<html>", 502)},
        "login_failed: the identity provider gave no ID token for its code (HTTP 502); log in again",
    ),
    "a client's secret that is missing": (
        {"secret": "s3cret"},
        "login_failed: the identity provider gave no ID token for its code (HTTP 401, invalid_client); log in again",
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_log_in_that_fails_opens_no_session_and_is_told(
    house: Running, provider: Provider, caplog: Log, name: str
) -> None:
    spoilt, message = PROBLEMS[name]
    vars(provider).update(spoilt)
    with Browser(house.url) as browser:
        assert browser.come_back(browser.begin()) == f"/#login={message.partition(':')[0]}"
        assert reason(caplog) == message
        assert browser.session == ""


def test_an_answer_without_a_code_or_of_another_issuer_is_refused(house: Running, caplog: Log) -> None:
    with Browser(house.url) as browser:
        address, _, rest = browser.begin().partition("&code=")
        assert rest and browser.come_back(address) == "/#login=login_failed"
        assert reason(caplog) == "login_failed: the identity provider sent no code; log in again"
        assert browser.come_back(browser.begin() + "&iss=https://other.example") == "/#login=login_failed"
        assert reason(caplog) == "login_failed: the answer comes from another identity provider; log in again"


def test_a_token_of_a_strangers_key_opens_no_session(house: Running, provider: Provider, caplog: Log) -> None:
    stranger = JSONResponse({"id_token": provider.token(Signer.generate("stranger"))})
    provider.token_answer = stranger
    with Browser(house.url) as browser:
        assert browser.come_back(browser.begin()) == "/#login=token_invalid"
        assert "signed with a key that the identity provider does not have" in reason(caplog)


def test_a_provider_that_is_down_is_told_on_the_page(
    house: Running, provider: Provider, clock: Clock, caplog: Log
) -> None:
    provider.discovery = {"issuer": "https://other.example"}
    clock.forward(3601)
    with Browser(house.url) as browser:
        response = browser.http.get("/auth/login")
        assert response.headers["location"] == f"{house.url}/#login=issuer_unreachable"
        assert "set-cookie" not in response.headers
        assert reason(caplog).startswith("issuer_unreachable: the identity provider cannot be reached")


def test_no_parameter_sends_the_browser_anywhere_else(house: Running) -> None:
    away = "next=https://evil.example&redirect_uri=https://evil.example&return_to=//evil.example"
    with Browser(house.url) as browser:
        asked = browser.http.get(f"/auth/login?{away}", headers={"Host": "evil.example"})
        assert query(asked.headers["location"])["redirect_uri"] == f"{house.url}/auth/callback"
        assert browser.come_back(browser.begin() + "&" + away) == "/"
        for path in ("/auth/callback", f"/auth/callback?{away}", "/auth/callback?state=x&code=y&state=z"):
            assert browser.come_back(path) == "/#login=login_expired"


@pytest.mark.parametrize("basic", [True, False])
def test_a_client_with_a_secret_presents_it_as_the_provider_wants_it(
    opening: Opening, provider: Provider, tmp_path: Any, basic: bool
) -> None:
    secret = tmp_path / "oidc.secret"
    secret.write_text("s3cret\n")
    provider.secret = "s3cret"
    provider.discovery = {} if basic else {"token_endpoint_auth_methods_supported": ["client_secret_post"]}

    async def logging_in() -> str:
        async with opening(client_secret_file=secret) as client:
            asked = (await client.get("/auth/login")).headers["location"]
            async with httpx.AsyncClient() as there:
                back = (await there.get(asked)).headers["location"]
            return str((await client.get(back)).headers["location"])

    assert run(logging_in()) == "https://gateway.example/"
    assert ("client_secret" in provider.forms[-1]) is not basic


def test_codes_tokens_and_secrets_are_in_no_log_line(house: Running, provider: Provider, caplog: Log) -> None:
    with caplog.at_level(logging.DEBUG), Browser(house.url) as browser:
        back = browser.begin()
        cookie = browser.http.cookies["seqr-login"]
        caplog.clear()

        def mine() -> list[str]:
            """The gateway's own lines: the browser of this test logs the addresses it opens."""
            lines = [str(record.__dict__) for record in list(caplog.records)]
            return [line for line in lines if "/auth/callback?" not in line and "httpcore" not in line]

        browser.come_back(back)
        # The line is written when the answer has gone, which may be after the browser has it.
        wait_until(lambda: any("'route': '/auth/callback'" in line and "'user': 'alice'" in line for line in mine()))
        code, verifier = provider.forms[-1]["code"], provider.forms[-1]["code_verifier"]
        for secret in (code, verifier, cookie, browser.session, query(back)["state"]):
            assert secret and not any(secret in line for line in mine())


def test_nobody_is_made_by_logging_in(house: Running, provider: Provider) -> None:
    before = house.world.policy.version()
    provider.claims = {"sub": "newcomer"}
    with Browser(house.url) as browser:
        browser.come_back(browser.begin())
        assert house.world.policy.version() == before
        house.world.policy.create_user("newcomer", **HOW)
        assert browser.log_in().models().status_code == 200
