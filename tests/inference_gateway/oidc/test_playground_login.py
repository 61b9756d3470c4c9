"""The playground's log-in with an identity provider, in a browser and through a real flow."""

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from tests.inference_gateway.conftest import HOW, Running
from tests.inference_gateway.oidc.provider import Provider
from tests.inference_gateway.playground.browsing import Visit, browser

__all__ = ["browser"]

QUESTION = "Where is the red boat?"


@pytest.fixture
def guest(browser: Browser, house: Running, provider: Provider) -> Iterator[Visit]:
    """A tab on the gateway's page; afterwards it has logged no error and asked nobody but gateway and provider."""
    provider.claims = {"sub": "alice", "human": True}
    visit = Visit(browser, house.url).open()
    yield visit
    foreign = [asked for asked in visit.requested if not asked.startswith((house.url, f"{provider.issuer}/authorize"))]
    visit.close()
    assert visit.problems == [] and foreign == []


def log_in(visit: Visit) -> None:
    visit.page.get_by_role("link", name="Log in with localhost").click()
    visit.page.get_by_role("link", name="I am alice").click()


def everything(visit: Visit) -> dict[str, Any]:
    found: dict[str, Any] = visit.page.evaluate(
        "({...sessionStorage, ...localStorage, cookie: document.cookie, url: location.href})"
    )
    return found


def test_a_log_in_with_the_provider_leads_to_a_chat_and_leaves_nothing_in_the_page(
    guest: Visit, house: Running
) -> None:
    log_in(guest)
    expect(guest.page.get_by_label("Message")).to_be_focused()
    assert everything(guest) == {"cookie": "", "url": f"{house.url}/"}
    cookies = {cookie["name"]: cookie for cookie in guest.context.cookies()}
    assert set(cookies) == {"seqr-session"}
    assert cookies["seqr-session"]["httpOnly"] and cookies["seqr-session"]["sameSite"] == "Strict"
    switches = guest.page.get_by_role("group", name="Silos", exact=True).locator("label.switch")
    expect(switches).to_have_text([" alpha"])
    guest.page.get_by_label("Max tokens").fill("4")
    guest.ask(QUESTION)
    guest.finished(1)
    message = {"role": "user", "content": QUESTION}
    answer = house.openai("alice").chat.completions.create(model="tiny", messages=[message], max_tokens=4)
    assert guest.text.text_content() == answer.choices[0].message.content


def test_the_log_in_is_there_after_a_reload_and_gone_after_the_log_out(guest: Visit) -> None:
    log_in(guest)
    expect(guest.page.get_by_label("Message")).to_be_focused()
    guest.page.reload()
    expect(guest.page.get_by_label("Message")).to_be_focused()
    with guest.page.expect_response("**/auth/logout") as left:
        guest.page.get_by_role("button", name="Log out").click()
    assert left.value.status == 204 and guest.context.cookies() == []
    guest.page.reload()
    expect(guest.page.get_by_role("link", name="Log in with localhost")).to_be_visible()
    expect(guest.page.get_by_label("API key")).to_be_focused()


def test_a_log_out_that_does_not_reach_the_gateway_is_told(guest: Visit) -> None:
    log_in(guest)
    expect(guest.page.get_by_label("Message")).to_be_focused()
    guest.context.set_offline(True)
    guest.page.get_by_role("button", name="Log out").click()
    expect(guest.page.get_by_role("alert")).to_have_text(
        "This browser is still logged inNo answer came from the gateway."
    )
    guest.context.set_offline(False)


def test_a_key_still_logs_in_where_there_is_a_provider(guest: Visit, house: Running) -> None:
    guest.log_in(house.world.keys["bob"])
    expect(guest.page.get_by_label("Message")).to_be_focused()
    assert everything(guest)["seqr-api-key"] == house.world.keys["bob"]


def test_a_user_who_is_disabled_meanwhile_is_told_and_led_to_the_log_in(
    guest: Visit, house: Running, provider: Provider
) -> None:
    house.world.policy.create_user("gina", **HOW)
    provider.claims["sub"] = "gina"
    log_in(guest)
    expect(guest.page.get_by_label("Message")).to_be_focused()
    house.world.policy.disable_user("gina", **HOW)
    guest.ask(QUESTION)
    guest.finished(1)
    alert = guest.answers.get_by_role("alert")
    expect(alert.locator("strong")).to_have_text("Your log-in is not accepted")
    expect(alert).to_contain_text("You are not logged in as an active user who may ask this gateway; ask an admin.")
    alert.get_by_role("button", name="Log in again").click()
    expect(guest.page.get_by_role("link", name="Log in with localhost")).to_be_visible()


def test_a_session_that_ended_is_told(guest: Visit, house: Running, clock: Any) -> None:
    log_in(guest)
    expect(guest.page.get_by_label("Message")).to_be_focused()
    clock.forward(8 * 3600 + 1)
    guest.ask(QUESTION)
    guest.finished(1)
    expect(guest.answers.get_by_role("alert")).to_contain_text(
        "Your log-in has endedyour log-in has ended; log in again"
    )


def test_a_refusal_of_the_provider_is_told_on_the_page(guest: Visit, provider: Provider) -> None:
    provider.denied = "access_denied"
    log_in(guest)
    alert = guest.page.get_by_role("alert")
    expect(alert).to_have_text("You are not logged inThe identity provider did not let you in.")
    guest.page.reload()
    expect(guest.page.get_by_label("API key")).to_be_focused()
    expect(alert).to_be_hidden()


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("issuer_unreachable", "The identity provider does not answer at the moment; try again."),
        ("login_denied", "The identity provider did not let you in."),
        ("login_expired", "The log-in took too long, or another one was begun in this browser; log in again."),
        ("login_not_accepted", "You are not logged in as an active user who may ask this gateway; ask an admin."),
        ("policy_unavailable", "The policy cannot be read at the moment; try again."),
        ("token_invalid", "What the identity provider says about you cannot be trusted here; ask an admin."),
        ("login_failed", "Something went wrong on the way; log in again."),
        ("constructor", "Something went wrong on the way; log in again."),
    ],
)
def test_every_reason_has_its_words(guest: Visit, code: str, told: str) -> None:
    guest.page.goto("about:blank")
    guest.page.goto(f"{guest.url}/#login={code}")
    expect(guest.page.get_by_role("alert")).to_have_text(f"You are not logged in{told}")
    assert everything(guest)["url"] == f"{guest.url}/"


def test_a_page_of_another_site_cannot_use_the_log_in(guest: Visit, house: Running, provider: Provider) -> None:
    log_in(guest)
    expect(guest.page.get_by_label("Message")).to_be_focused()
    evil = guest.context.new_page()
    evil.goto(f"{provider.issuer}/authorize?state=x")
    attempt = """async ([url, init]) => {
        try { return (await fetch(url, {credentials: "include", ...init})).type } catch { return "blocked" }
    }"""
    with_header = {"headers": {"X-Seqr-Session": "1"}}
    assert evil.evaluate(attempt, [f"{house.url}/v1/models", with_header]) == "blocked"
    assert evil.evaluate(attempt, [f"{house.url}/v1/models", {}]) == "blocked"
    before = house.service.serving.engine.info().generated_tokens
    body = '{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 4}'
    post = {"method": "POST", "mode": "no-cors", "body": body}
    assert evil.evaluate(attempt, [f"{house.url}/v1/chat/completions", post]) == "opaque"
    assert evil.evaluate(attempt, [f"{house.url}/auth/logout", {"method": "POST", "mode": "no-cors"}]) == "opaque"
    assert house.service.serving.engine.info().generated_tokens == before
    guest.page.reload()
    expect(guest.page.get_by_label("Message")).to_be_focused()
