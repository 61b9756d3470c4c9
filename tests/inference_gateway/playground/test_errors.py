"""What a person is told when something goes wrong."""

import pytest
from playwright.sync_api import expect

from tests.inference_gateway.playground.browsing import Visit
from tests.inference_gateway.playground.fake_gateway import KEY, FakeGateway, Refusal, Script


@pytest.mark.parametrize(
    ("status", "code", "title", "again"),
    [
        (400, "context_length_exceeded", "The gateway refuses this request", False),
        (403, "scope_missing", "This is not permitted", False),
        (404, "model_not_found", "It does not exist, or not for you", False),
        (413, "body_too_large", "The message is too large", False),
        (500, "internal_error", "The gateway failed", True),
        (503, "overloaded", "The gateway cannot answer now", True),
    ],
)
def test_an_error_is_named_with_the_gateways_own_words(
    fake: FakeGateway, user: Visit, status: int, code: str, title: str, again: bool
) -> None:
    fake.refusals = [Refusal(status, code, "what the gateway says about it")]
    user.ask("hi")
    user.finished(1)
    alert = user.answers.get_by_role("alert")
    expect(alert.locator("strong")).to_have_text(title)
    expect(alert).to_contain_text("what the gateway says about it")
    expect(alert).to_contain_text(code)
    expect(alert.get_by_role("button")).to_have_count(1 if again else 0)


def test_a_key_that_ended_leads_back_to_the_login(fake: FakeGateway, user: Visit) -> None:
    expect(user.page.get_by_label("Message")).to_be_focused()
    fake.key = "another"
    user.ask("hi")
    user.finished(1)
    expect(user.answers.get_by_role("alert")).to_contain_text("The key is not accepted")
    user.page.get_by_role("button", name="Log in again").click()
    expect(user.page.get_by_label("API key")).to_be_focused()
    assert user.page.evaluate("sessionStorage.length") == 0


def test_too_many_requests_says_when_to_ask_again_and_does(fake: FakeGateway, user: Visit) -> None:
    fake.refusals = [Refusal(429, "rate_limited", "10 requests a minute are allowed", {"Retry-After": "3600"})]
    user.ask("a b")
    user.finished(1)
    expect(user.answers.get_by_role("alert")).to_contain_text("Too many requests")
    wait = user.page.get_by_role("button", name="Ask again in")
    expect(wait).to_be_disabled()
    assert 3500 < int(wait.inner_text().split()[-2]) <= 3600
    fake.refusals = [Refusal(429, "rate_limited", "10 requests a minute are allowed", {"Retry-After": "1"})]
    user.ask("c d")
    user.finished(2)
    button = user.answers.last.get_by_role("button", name="Ask again", exact=True)
    expect(button).to_be_enabled()
    button.click()
    expect(user.text).to_have_text("c d")
    assert [message["content"] for message in fake.bodies[-1]["messages"]] == ["c d"]
    expect(user.answers).to_have_count(2)


def test_a_retry_after_that_is_a_date_is_understood(fake: FakeGateway, user: Visit) -> None:
    far = {"Retry-After": "Fri, 01 Jan 2100 00:00:00 GMT"}
    fake.refusals = [Refusal(429, "rate_limited", "come back another day", far)]
    user.ask("hi")
    user.finished(1)
    expect(user.page.get_by_role("button", name="Ask again in")).to_be_disabled()


@pytest.mark.parametrize(
    ("code", "title", "again"),
    [
        ("permission_revoked", "A permission was withdrawn while the answer was written", 0),
        ("adapter_replaced", "A silo's adapter was replaced while the answer was written", 1),
        ("policy_unavailable", "The policy cannot be read at the moment", 1),
        ("engine_failed", "The answer broke off", 1),
    ],
)
def test_an_error_in_the_middle_of_a_stream_is_told_under_what_came(
    fake: FakeGateway, user: Visit, code: str, title: str, again: int
) -> None:
    fake.script = Script([("half an", None)], end=code)
    user.ask("hi")
    user.finished(1)
    expect(user.text).to_have_text("half an")
    alert = user.answers.get_by_role("alert")
    expect(alert.locator("strong")).to_have_text(title)
    expect(alert).to_contain_text("a silo it used was withdrawn")
    expect(alert.get_by_role("button", name="Ask again")).to_have_count(again)
    fake.script = None
    user.ask("more")
    user.finished(2)
    assert [message["content"] for message in fake.bodies[-1]["messages"]] == ["more"]


def test_a_stream_that_ends_too_early_is_told(fake: FakeGateway, user: Visit) -> None:
    fake.script = Script([("half an", None)], end="cut")
    user.ask("hi")
    user.finished(1)
    expect(user.answers.get_by_role("alert")).to_contain_text("The connection ended before the answer did.")


def test_a_stream_that_is_no_answer_is_told(fake: FakeGateway, user: Visit) -> None:
    fake.script = Script([], raw=[b"data: <html>\n\n"])
    user.ask("hi")
    user.finished(1)
    expect(user.answers.get_by_role("alert")).to_contain_text("what came over it was no answer")


def test_a_gateway_that_cannot_be_reached_is_told_and_can_be_asked_again(fake: FakeGateway, user: Visit) -> None:
    expect(user.page.get_by_label("Message")).to_be_focused()
    user.context.set_offline(True)
    user.ask("hi there")
    user.finished(1)
    expect(user.answers.get_by_role("alert")).to_contain_text("The gateway cannot be reached")
    user.context.set_offline(False)
    user.page.get_by_role("button", name="Ask again").click()
    expect(user.text).to_have_text("hi there")
    assert fake.keys_seen >= {f"Bearer {KEY}"}
