"""Permitted silos as switches, and two sets of them side by side."""

from playwright.sync_api import expect

from tests.inference_gateway.playground.browsing import Visit
from tests.inference_gateway.playground.fake_gateway import FakeGateway, Refusal, Script


def test_the_switches_are_the_silos_that_the_key_may_use(fake: FakeGateway, user: Visit) -> None:
    switches = user.page.get_by_role("group", name="Silos", exact=True).get_by_role("switch")
    expect(switches).to_have_count(3)
    assert all(switch.is_checked() for switch in switches.all())
    user.switch("clinic").click()
    user.ask("a b c")
    user.finished(1)
    assert fake.bodies[0]["seqr"] == {"attribution": True, "silos": ["bank", "school"]}
    user.page.get_by_role("button", name="All off").click()
    user.ask("a b c")
    user.finished(2)
    assert fake.bodies[1]["seqr"] == {"attribution": True, "silos": []}
    user.page.get_by_role("button", name="All on").click()
    user.ask("a b c")
    user.finished(3)
    assert fake.bodies[2]["seqr"] == {"attribution": True}


def test_whoever_may_use_no_silo_is_told_so(fake: FakeGateway, user: Visit) -> None:
    fake.silos = []
    user.page.reload()
    expect(user.page.get_by_role("group", name="Silos", exact=True)).to_contain_text("No silo is open to you")
    user.ask("a b")
    user.finished(1)
    expect(user.text).to_have_text("a b")
    assert fake.bodies[0]["seqr"] == {"attribution": True}


def test_many_silos_can_be_filtered_and_all_look_different(fake: FakeGateway, user: Visit) -> None:
    fake.silos = [f"silo-{number:02d}" for number in range(35)]
    user.page.reload()
    rows = user.page.locator("#sets label.switch")
    expect(rows).to_have_count(35)
    looks = {row.locator(".token").get_attribute("class") for row in rows.all()}
    assert len(looks) == 35
    user.page.get_by_label("Filter the silos").fill("3")
    expect(rows.locator("visible=true")).to_have_count(8)
    user.page.get_by_role("button", name="All off").click()
    user.ask("a")
    user.finished(1)
    assert fake.bodies[0]["seqr"]["silos"] == [name for name in fake.silos if "3" not in name]


def test_two_sets_answer_the_same_prompt_side_by_side(fake: FakeGateway, user: Visit) -> None:
    user.ask("before")
    user.finished(1)
    user.switch("school").click()
    user.page.get_by_role("switch", name="Compare sets").click()
    assert not user.switch("school", "Set B").is_checked()
    user.switch("clinic", "Set B").click()
    user.ask("a b c")
    user.finished(3)
    first, second = fake.bodies[1:]
    asked = sorted((body["seqr"]["silos"] for body in (first, second)), key=len)
    assert asked == [["bank"], ["bank", "clinic"]]
    assert first["messages"] == second["messages"]
    left, right = user.answers.nth(1), user.answers.nth(2)
    expect(left.get_by_role("heading")).to_have_text("A · bank, clinic")
    expect(right.get_by_role("heading")).to_have_text("B · bank")
    a, b = left.bounding_box(), right.bounding_box()
    assert a and b and a["y"] == b["y"] and a["x"] + a["width"] <= b["x"]
    titles = [token.get_attribute("title") for token in right.locator(".text .token").all()]
    assert titles == ["bank 90 %", "bank 62 %", "bank 41 %"]


def test_each_set_goes_on_from_its_own_answers(fake: FakeGateway, user: Visit) -> None:
    user.page.get_by_role("switch", name="Compare sets").click()
    user.switch("bank", "Set B").click()
    user.ask("one")
    user.finished(2)
    fake.refusals = [Refusal(503, "overloaded", "too many requests are waiting")]
    user.ask("two")
    user.finished(4)
    failed = user.page.locator("article.answer:has([role=alert]:not([hidden]))")
    expect(failed).to_have_count(1)
    was_b = failed.get_by_role("heading").inner_text().startswith("B")
    user.ask("three")
    user.finished(6)
    lengths = {"silos" in body["seqr"]: len(body["messages"]) for body in fake.bodies[4:]}
    assert lengths == {was_b: 3, not was_b: 5}


def test_stop_ends_both_answers(fake: FakeGateway, user: Visit) -> None:
    user.page.get_by_role("switch", name="Compare sets").click()
    fake.script = Script([("so far", None)], end="hang")
    user.ask("hi")
    expect(user.page.get_by_text("so far")).to_have_count(2)
    user.page.get_by_role("button", name="Stop").click()
    user.finished(2)


def test_one_answer_can_be_asked_again_while_the_other_is_still_written(fake: FakeGateway, user: Visit) -> None:
    user.page.get_by_role("switch", name="Compare sets").click()
    user.switch("bank", "Set B").click()
    fake.by_set = lambda silos: Script([("half", None)], end="hang" if "bank" in silos else "engine_failed")
    user.ask("hi")
    user.page.get_by_role("button", name="Ask again").wait_for()
    fake.by_set = lambda silos: Script([("whole", None)])
    user.page.get_by_role("button", name="Ask again").click()
    expect(user.text).to_have_text("whole")
    expect(user.answers.first).to_have_attribute("aria-busy", "true")
    expect(user.answers.last.get_by_role("heading")).to_have_text("B · clinic, school")
    user.page.get_by_role("button", name="Stop").click()
    user.finished(2)


def test_a_silo_that_is_withdrawn_loses_its_switch_and_a_new_one_gets_one(fake: FakeGateway, user: Visit) -> None:
    user.switch("school").click()
    fake.silos = ["bank", "school", "museum"]
    fake.refusals = [
        Refusal(404, "model_not_found", "the model 'silo:clinic' does not exist or is not available to you")
    ]
    user.ask("hi")
    user.finished(1)
    expect(user.page.get_by_role("alert")).to_contain_text("It does not exist, or not for you")
    expect(user.switch("clinic")).to_have_count(0)
    expect(user.switch("museum")).to_be_checked()
    expect(user.switch("school")).not_to_be_checked()
