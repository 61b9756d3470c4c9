"""Log in, ask, read who shaped what, stop, log out: against a gateway without a model."""

import json
import re

import pytest
from playwright.sync_api import expect

from tests.inference_gateway.playground.browsing import Visit, Visiting
from tests.inference_gateway.playground.fake_gateway import KEY, FakeGateway, Script, choice, event, token


def storage(user: Visit) -> dict[str, str]:
    return user.page.evaluate("({...sessionStorage, ...localStorage, cookie: document.cookie})")


def test_a_wrong_key_is_told_and_not_kept(fake: FakeGateway, visiting: Visiting) -> None:
    guest = visiting().log_in("seqr_wrongwrong_xyz")
    expect(guest.page.get_by_role("alert")).to_have_text("The key is not acceptedthis API key is unknown")
    guest.log_in("two words")
    expect(guest.page.get_by_role("alert")).to_contain_text("An API key has no spaces and only ASCII characters.")
    assert storage(guest) == {"cookie": ""}
    expect(guest.page.get_by_label("Message")).to_be_hidden()


def test_a_gateway_that_cannot_be_reached_is_told_at_the_login(fake: FakeGateway, visiting: Visiting) -> None:
    guest = visiting()
    guest.context.set_offline(True)
    guest.log_in(KEY)
    expect(guest.page.get_by_role("alert")).to_contain_text("The gateway cannot be reached")
    guest.context.set_offline(False)
    guest.page.get_by_role("button", name="Log in").click()
    expect(guest.page.get_by_label("Message")).to_be_focused()


def test_the_key_lives_in_the_tab_until_log_out(user: Visit, visiting: Visiting) -> None:
    expect(user.page.get_by_label("Message")).to_be_focused()
    assert storage(user) == {"seqr-api-key": KEY, "cookie": ""}
    assert KEY not in user.page.content() and user.page.get_by_label("API key").input_value() == ""
    user.page.reload()
    expect(user.page.get_by_label("Message")).to_be_focused()
    user.ask("one two three")
    user.finished(1)
    user.page.get_by_role("button", name="Log out").click()
    assert storage(user) == {"cookie": ""}
    assert "one two three" not in user.page.content()
    user.page.reload()
    expect(user.page.get_by_label("API key")).to_be_focused()


def test_every_token_is_tinted_by_the_silo_that_shaped_it_and_the_legend_names_it(user: Visit) -> None:
    user.ask("a b c d e f")
    user.finished(1)
    tokens = user.text.locator(".token")
    assert tokens.all_text_contents() == ["a", " b", " c", " d", " e", " f"]
    titles = [token.get_attribute("title") for token in tokens.all()]
    assert titles == ["bank 90 %", "clinic 62 %", "school 41 %", "bank 90 %", "base model", "school 41 %"]
    looks = [set((token.get_attribute("class") or "").split()) for token in tokens.all()]
    assert looks[0] == looks[3] == {"token", "tinted", "hue-0", "line-0", "strong"}
    assert looks[1] == {"token", "tinted", "hue-1", "line-1", "middling"}
    assert looks[4] == {"token"}
    legend = user.page.get_by_role("list", name=re.compile("Tinted by")).get_by_role("listitem")
    assert legend.all_text_contents() == ["bank", "clinic", "school", "base model"]
    assert {"hue-0", "line-0"} <= set((legend.first.get_attribute("class") or "").split())


def test_the_foot_of_an_answer_has_its_shares_and_versions(user: Visit) -> None:
    user.ask("a b c")
    user.finished(1)
    expect(user.answers.locator("footer span")).to_have_text(
        "complete · bank 33 %, clinic 33 %, school 33 % · routing prompt_evidence · policy 41 · "
        "library 0123456789abcdef"
    )


def test_a_click_on_a_token_shows_its_scores(fake: FakeGateway, user: Visit) -> None:
    fake.script = Script([("Hello", [token("Hello", "clinic", {"clinic": 0.83, "bank": 0.1}, 1.7342, 9906)])])
    user.ask("hi")
    user.finished(1)
    user.text.get_by_text("Hello").click()
    panel = user.page.get_by_role("complementary", name="Token")
    expect(panel).to_contain_text('"Hello" id 9906')
    expect(panel).to_contain_text("Shaped by clinic")
    rows = [" ".join(row.all_text_contents()) for row in panel.get_by_role("row").all()]
    assert [row.replace("  ", " ") for row in rows] == ["clinic83 %", "bank10 %", "base model alone7.0 %"]
    assert panel.get_by_role("meter", name="Share of clinic").get_attribute("value") is not None
    expect(panel).to_contain_text("Margin 1.73")
    user.page.keyboard.press("Escape")
    expect(panel).to_be_hidden()


def test_a_token_with_nothing_to_choose_between_has_no_margin(fake: FakeGateway, user: Visit) -> None:
    fake.script = Script([("Hello", [token("Hello", None, {}, None)])])
    user.ask("hi")
    user.finished(1)
    user.text.get_by_text("Hello").click()
    panel = user.page.get_by_role("complementary", name="Token")
    expect(panel).to_contain_text("Shaped by base model")
    expect(panel).to_contain_text("No margin: there were no two silos to choose between.")


def test_the_keyboard_alone_logs_in_asks_and_reads_scores(fake: FakeGateway, visiting: Visiting) -> None:
    page = visiting().page
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    expect(page.get_by_label("Message")).to_be_focused()
    page.keyboard.type("a b")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("c")
    page.keyboard.press("Enter")
    expect(page.locator("article.answer:not([aria-busy])")).to_have_count(1)
    assert fake.bodies[0]["messages"] == [{"role": "user", "content": "a b\nc"}]
    text = page.get_by_role("group", name=re.compile("^Answer"))
    while not text.evaluate("node => node === document.activeElement"):
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("ArrowRight")
    panel = page.get_by_role("complementary", name="Token")
    expect(panel).to_contain_text('"a"')
    page.keyboard.press("End")
    expect(panel).to_contain_text('" b\\nc"')
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    expect(panel).to_contain_text('"a"')
    assert page.locator(".token.selected").all_text_contents() == ["a"]
    page.keyboard.press("Escape")
    expect(panel).to_be_hidden()


def test_chunks_without_attribution_are_plain_text(fake: FakeGateway, user: Visit) -> None:
    fake.script = Script([("plain ", None), ("text", None)])
    user.ask("hi")
    user.finished(1)
    expect(user.text).to_have_text("plain text")
    user.text.get_by_text("text").click()
    expect(user.page.get_by_role("complementary", name="Token")).to_be_hidden()
    expect(user.page.get_by_role("list", name=re.compile("Tinted by"))).to_be_hidden()


def test_tokens_that_share_a_character_never_change_the_text(fake: FakeGateway, user: Visit) -> None:
    halves = [token("\ufffd", "bank", {"bank": 1.0}, 1.0), token("\ufffd", "clinic", {"clinic": 1.0}, 1.0)]
    fake.script = Script([("x😀", [token("x", "bank", {"bank": 1.0}, 1.0), *halves]), (" y", halves[:1]), ("z", [])])
    user.ask("hi")
    user.finished(1)
    assert user.text.text_content() == "x😀 yz"
    assert user.text.locator(".token").all_text_contents() == ["x", "😀", " y", "z"]
    expect(user.text.get_by_text("😀")).to_have_attribute("title", "clinic 100 %")


STREAM = (
    b": keep-alive\r\n\r\n"
    + event({"say": "gr\u00fc\u00df"})
    + b"event: ping\ndata\n\nid: 3\r\rdata: two\r\ndata:lines\r\n\r\n"
    + event({"say": "\U0001f600"}).replace(b"\n", b"\r")
    + b"data: [DONE]\r\n\r\ndata: never ended\n"
)
READ = """async ([bytes, size]) => {
  const { eventData } = await import("/playground/sse.js");
  const pieces = [];
  for (let at = 0; at < bytes.length; at += size) pieces.push(Uint8Array.from(bytes.slice(at, at + size)));
  const body = new ReadableStream({
    pull(controller) {
      if (pieces.length) controller.enqueue(pieces.shift());
      else controller.close();
    },
  });
  const found = [];
  for await (const data of eventData(body)) found.push(data);
  return found;
}"""


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 1000])
def test_a_stream_cut_anywhere_reads_the_same(user: Visit, size: int) -> None:
    found = user.page.evaluate(READ, [list(STREAM), size])
    assert found == ['{"say": "grüß"}', "two\nlines", '{"say": "😀"}', "[DONE]"]


def test_keep_alives_and_unknown_fields_are_passed_over(fake: FakeGateway, user: Visit) -> None:
    said = event(choice({"content": "grüß 😀"}))
    fake.script = Script([], raw=[b": keep-alive\n\n", b"event: ping\nid: 7\n\n", said, b"data: [DONE]\n\n"])
    user.ask("hi")
    user.finished(1)
    expect(user.text).to_have_text("grüß 😀")


MARKUP = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>&lt;b&gt;"


def test_text_of_any_kind_is_never_markup(fake: FakeGateway, user: Visit) -> None:
    fake.silos = [MARKUP, "bank"]
    fake.script = Script(
        [(MARKUP, [token(MARKUP, MARKUP, {MARKUP: 1.0}, 1.0)]), (MARKUP, None)],
        end="<b>code</b>",
    )
    user.page.reload()
    user.ask(MARKUP)
    user.finished(1)
    user.text.locator(".token").first.click()
    expect(user.page.get_by_role("complementary", name="Token")).to_contain_text(MARKUP)
    assert user.text.text_content() == MARKUP * 2
    assert user.page.locator(".prompt p").text_content() == MARKUP
    user.answers.get_by_role("button", name="As code").click()
    expect(user.page.locator("#code-curl")).to_contain_text("onerror")
    assert user.page.locator("img, script:not([src]), #turns b, aside b").count() == 0
    assert user.page.title() == "seqr playground"


def test_stop_ends_the_request_and_keeps_what_came(fake: FakeGateway, user: Visit) -> None:
    fake.script = Script([("so far", None)], end="hang")
    user.ask("hi")
    expect(user.text).to_have_text("so far")
    user.page.get_by_role("button", name="Stop").click()
    user.finished(1)
    assert fake.left.wait(30), "the gateway still writes"
    expect(user.answers.locator("footer")).to_contain_text("stopped by you")
    fake.script = None
    user.ask("more")
    user.finished(2)
    assert [message["content"] for message in fake.bodies[1]["messages"]] == ["hi", "so far", "more"]


def test_log_out_ends_the_running_answer(fake: FakeGateway, user: Visit) -> None:
    fake.script = Script([("so far", None)], end="hang")
    user.ask("hi")
    expect(user.text).to_have_text("so far")
    user.page.get_by_role("button", name="Log out").click()
    assert fake.left.wait(30), "the gateway still writes"
    expect(user.page.get_by_label("API key")).to_be_focused()
    assert "so far" not in user.page.content()


def test_the_settings_are_sent_and_empty_ones_are_not(fake: FakeGateway, user: Visit) -> None:
    user.ask("first")
    user.finished(1)
    user.page.get_by_label("System prompt").fill("Be brief.")
    user.page.get_by_label("Max tokens").fill("5")
    user.page.get_by_label("Temperature").fill("0.5")
    user.page.get_by_label("Seed").fill("3")
    user.page.get_by_label("Routing").select_option("per_token")
    user.ask("second")
    user.finished(2)
    plain, full = fake.bodies
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    first = {"role": "user", "content": "first"}
    assert plain == {"model": "tiny", "messages": [first], "seqr": {"attribution": True}} | stream
    rest = [{"role": "assistant", "content": "first"}, {"role": "user", "content": "second"}]
    assert full == stream | {
        "model": "tiny",
        "messages": [{"role": "system", "content": "Be brief."}, first, *rest],
        "max_tokens": 5,
        "temperature": 0.5,
        "seed": 3,
        "seqr": {"attribution": True, "routing": "per_token"},
    }


def test_a_setting_out_of_range_is_told_before_anything_is_sent(fake: FakeGateway, user: Visit) -> None:
    temperature = user.page.get_by_label("Temperature")
    temperature.fill("7")
    user.ask("hi")
    expect(temperature).to_be_focused()
    assert temperature.evaluate("input => input.validationMessage") != ""
    assert fake.bodies == [] and user.answers.count() == 0


def test_a_screen_reader_hears_sentences_and_the_end(fake: FakeGateway, user: Visit) -> None:
    fake.script = Script([(piece, None) for piece in ("One", " sen", "tence. ", "Ano", "ther")])
    user.ask("hi")
    user.finished(1)
    log = user.page.get_by_role("log")
    expect(log).to_have_attribute("aria-live", "polite")
    assert log.locator("p").all_text_contents() == ["One sentence.", "Another", "End of the answer, complete."]


def test_a_new_conversation_forgets_the_old_one(fake: FakeGateway, user: Visit) -> None:
    user.ask("one")
    user.finished(1)
    user.page.get_by_role("button", name="New chat").click()
    expect(user.answers).to_have_count(0)
    user.ask("two")
    user.finished(1)
    assert json.dumps(fake.bodies[1]).count("one") == 0
