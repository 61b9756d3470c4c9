"""The playground of a running gateway, with its policy and its model."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect

from seqr.plan import Plan
from tests.inference_gateway.conftest import HOW, Running, World
from tests.inference_gateway.playground.browsing import Visiting
from tests.inference_gateway.support import random_adapter

QUESTION = "Where is the red boat?"


def test_a_user_sees_their_own_silos_and_gets_the_same_answer_as_any_client(
    running: Running, visiting: Visiting
) -> None:
    user = visiting(running.url).log_in(running.world.keys["alice"])
    switches = user.page.get_by_role("group", name="Silos", exact=True).locator("label.switch")
    expect(switches).to_have_text([" alpha", " gamma"])
    user.page.get_by_label("Max tokens").fill("8")
    user.ask(QUESTION)
    user.finished(1)
    message = {"role": "user", "content": QUESTION}
    answer = running.openai("alice").chat.completions.create(model="tiny", messages=[message], max_tokens=8)
    assert answer.choices[0].message.content
    assert user.text.text_content() == answer.choices[0].message.content
    expect(user.answers.locator("footer")).to_contain_text("routing prompt_evidence · policy ")
    assert not any("beta" in text for text in user.page.locator("body").all_inner_texts())


def test_a_switched_off_silo_shapes_nothing(running: Running, visiting: Visiting) -> None:
    user = visiting(running.url).log_in(running.world.keys["alice"])
    user.page.get_by_label("Max tokens").fill("8")
    user.page.get_by_role("switch", name="Compare sets").click()
    user.switch("gamma", "Set A").click()
    user.page.get_by_role("group", name="Set B").get_by_role("button", name="All off").click()
    user.ask(QUESTION)
    user.finished(2)
    message = {"role": "user", "content": QUESTION}
    for index, silos in enumerate((["alpha"], [])):
        answer = running.openai("alice").chat.completions.create(
            model="tiny", messages=[message], max_tokens=8, extra_body={"seqr": {"silos": silos}}
        )
        assert user.answers.nth(index).locator(".text").text_content() == answer.choices[0].message.content


def test_a_prompt_longer_than_the_context_is_told_in_the_gateways_words(running: Running, visiting: Visiting) -> None:
    user = visiting(running.url).log_in(running.world.keys["carol"])
    expect(user.page.get_by_role("group", name="Silos", exact=True)).to_contain_text("No silo is open to you")
    user.ask("long " * 2000)
    user.finished(1)
    alert = user.answers.get_by_role("alert")
    expect(alert).to_contain_text("The gateway refuses this request")
    expect(alert).to_contain_text("context_length_exceeded")


def test_a_key_of_another_scope_is_told_at_the_login(running: Running, visiting: Visiting) -> None:
    store = running.world.policy
    store.create_user("clerk", ["auditor"], **HOW)
    guest = visiting(running.url).log_in(store.create_key("clerk", ["audit"], **HOW).secret)
    expect(guest.page.get_by_role("alert")).to_contain_text("This is not permitted")


@pytest.fixture
def own(make_world: Callable[[Path], World], plan: Plan, tmp_path: Path) -> Iterator[Running]:
    """A gateway whose policy these tests may change."""
    world = make_world(tmp_path / "gateway")
    world.coordinator.stage("alpha", 1, random_adapter(plan, 0))
    world.grant("alice", "alpha")
    server = Running(world).start()
    try:
        server.await_adapters("alpha")
        yield server
    finally:
        server.stop()


def test_a_grant_that_is_withdrawn_ends_the_answer_and_takes_the_switch_away(own: Running, visiting: Visiting) -> None:
    user = visiting(own.url).log_in(own.world.keys["alice"])
    user.page.get_by_label("Max tokens").fill("400")
    user.ask(QUESTION)
    expect(user.text).not_to_be_empty()
    own.world.revoke("alice", "alpha")
    user.finished(1)
    alert = user.answers.get_by_role("alert")
    expect(alert.locator("strong")).to_have_text("A permission was withdrawn while the answer was written")
    expect(user.page.get_by_role("group", name="Silos", exact=True)).to_contain_text("No silo is open to you")


def test_the_tints_are_the_silos_that_the_gateway_names(running: Running, visiting: Visiting) -> None:
    user = visiting(running.url).log_in(running.world.keys["alice"])
    user.page.get_by_label("Max tokens").fill("8")
    user.ask(QUESTION)
    user.finished(1)
    body = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 8}
    response = running.http("alice").post("/v1/chat/completions", json=body | {"seqr": {"attribution": True}})
    tokens = [token for token in response.json()["choices"][0]["seqr"]["tokens"] if token["token"]]
    spans = user.text.locator(".token")
    assert spans.all_text_contents() == [token["token"] for token in tokens]
    named = [(span.get_attribute("title") or "").rpartition(" ")[0].split(" ")[0] for span in spans.all()]
    assert named == [token["silo"] for token in tokens] and set(named) <= {"alpha", "gamma"}
    spans.last.click()
    panel = user.page.get_by_role("complementary", name="Token")
    expect(panel).to_contain_text(f"id {tokens[-1]['id']}")
    expect(panel).to_contain_text(f"Shaped by {tokens[-1]['silo']}")
    expect(panel).to_contain_text("Margin ")
