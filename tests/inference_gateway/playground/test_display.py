"""Widths, colour schemes and contrast."""

from typing import Any

import pytest
from playwright.sync_api import expect

from tests.inference_gateway.playground.browsing import Visit, Visiting
from tests.inference_gateway.playground.fake_gateway import KEY, FakeGateway, Script, token

# An element's text and the ground it lies on, as [r, g, b] in sRGB, 0 to 1. color-mix computes to color(srgb ...).
COLOURS = """node => {
  const parse = (value) => {
    const numbers = value.match(/[\\d.]+/g).map(Number);
    const scale = value.startsWith("color(") ? 1 : 255;
    return { rgb: numbers.slice(0, 3).map(n => n / scale), a: numbers[3] ?? 1 };
  };
  const text = parse(getComputedStyle(node).color).rgb;
  for (let at = node; at; at = at.parentElement) {
    const ground = parse(getComputedStyle(at).backgroundColor);
    if (ground.a === 1) return [text, ground.rgb];
  }
  return [text, [1, 1, 1]];
}"""


def contrast(pair: list[list[float]]) -> float:
    """WCAG 2.2, "contrast ratio": (lighter + 0.05) / (darker + 0.05)."""

    def luminance(rgb: list[float]) -> float:
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted(luminance(rgb) for rgb in pair)
    return (high + 0.05) / (low + 0.05)


def test_the_contrast_formula_knows_its_ends() -> None:
    assert contrast([[0, 0, 0], [1, 1, 1]]) == pytest.approx(21)
    assert contrast([[0.5, 0.5, 0.5]] * 2) == pytest.approx(1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_and_every_tint_has_the_contrast_of_wcag_aa(
    fake: FakeGateway, visiting: Visiting, scheme: str
) -> None:
    fake.silos = [f"silo-{number}" for number in range(7)]
    shares = (1.0, 0.6, 0.2)
    fake.script = Script(
        [(f"{silo} ", [token(f"{silo} ", silo, {silo: share}, 1.0)]) for silo in fake.silos for share in shares],
        end="engine_failed",
    )
    user = visiting(color_scheme=scheme)
    ground = user.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    user.log_in(KEY)
    user.ask("hi")
    user.finished(1)
    user.text.locator(".token").first.click()
    assert user.text.locator(".token").count() == 21
    seen: dict[str, float] = {}
    for node in user.page.locator(
        ".token, .hint, label, legend, button, summary, h1, h2, th, td, p, strong, code"
    ).all():
        if node.is_visible():
            name = f"{node.evaluate('node => node.tagName + node.className')} {node.inner_text()[:30]}"
            seen[name] = contrast(node.evaluate(COLOURS))
    assert len(seen) > 50
    assert {name: ratio for name, ratio in seen.items() if ratio < 4.5} == {}


def controls(user: Visit) -> list[dict[str, Any]]:
    return user.page.evaluate(
        """[...document.querySelectorAll("button, input, select, textarea, summary")]
        .filter(node => node.checkVisibility())
        .map(node => ({name: node.id || node.textContent, right: node.getBoundingClientRect().right,
          bottom: node.getBoundingClientRect().bottom}))"""
    )


@pytest.mark.parametrize("width", [320, 390])
def test_on_a_phone_everything_fits_the_width(fake: FakeGateway, user: Visit, width: int) -> None:
    page = user.page
    page.set_viewport_size({"width": width, "height": 700})
    expect(page.get_by_label("System prompt")).to_be_hidden()
    page.get_by_role("switch", name="Compare sets").click()
    user.ask("word " * 20 + "x" * 200)
    user.finished(2)
    a, b = (answer.bounding_box() for answer in user.answers.all())
    assert a and b and b["y"] >= a["y"] + a["height"]  # one below the other
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.querySelector('#turns').scrollWidth") <= width
    user.text.locator(".token").first.click()
    panel = page.get_by_role("complementary", name="Token").bounding_box()
    assert panel and panel["width"] == width and panel["y"] + panel["height"] == 700
    page.keyboard.press("Escape")
    page.get_by_text("Silos and settings").click()
    expect(page.get_by_label("System prompt")).to_be_visible()
    assert controls(user) and all(control["right"] <= width for control in controls(user))
    send = page.get_by_role("button", name="Send").bounding_box()
    assert send and send["y"] + send["height"] <= 700


def test_every_control_has_a_name(user: Visit) -> None:
    user.ask("a b c")
    user.finished(1)
    unnamed = user.page.evaluate(
        """[...document.querySelectorAll("button, input, select, textarea")]
        .filter(node => !(node.labels?.length || node.textContent.trim() || node.getAttribute("aria-label")))
        .map(node => node.outerHTML)"""
    )
    assert unnamed == []


def test_what_has_the_focus_shows_it(user: Visit) -> None:
    expect(user.page.get_by_label("Message")).to_be_focused()
    for _ in range(6):
        user.page.keyboard.press("Shift+Tab")
        style = "(({outlineStyle, outlineWidth}) => `${outlineWidth} ${outlineStyle}`)"
        assert user.page.evaluate(f"{style}(getComputedStyle(document.activeElement))") == "3px solid"
