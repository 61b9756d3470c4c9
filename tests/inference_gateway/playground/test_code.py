"""A request as curl and as Python: both run, and neither holds the key."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from playwright.sync_api import expect

from tests.inference_gateway.conftest import Running
from tests.inference_gateway.playground.browsing import Visit, Visiting
from tests.inference_gateway.playground.fake_gateway import KEY, FakeGateway

# Whatever a shell or Python could take for its own.
PROMPT = "it's \"$HOME\" `id` $(id) \\n \\' {'a': True} \u2028 😀\nsecond line null true"


@pytest.fixture
def alice(running: Running, visiting: Visiting) -> Visit:
    user = visiting(running.url).log_in(running.world.keys["alice"])
    user.switch("gamma").click()
    user.page.get_by_label("Max tokens").fill("6")
    user.page.get_by_label("Seed").fill("5")
    user.ask(PROMPT)
    user.finished(1)
    user.answers.get_by_role("button", name="As code").click()
    return user


def test_the_curl_command_gets_the_same_answer(alice: Visit, running: Running) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command = alice.page.locator("#code-curl").text_content() or ""
    environment = os.environ | {"SEQR_API_KEY": running.world.keys["alice"]}
    done = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["message"]["content"] == alice.text.text_content()
    assert answer["seqr"]["permitted"] == ["alpha"]


def test_the_python_program_gets_the_same_answer(alice: Visit, running: Running) -> None:
    program = alice.page.locator("#code-python").text_content() or ""
    environment = os.environ | {"SEQR_API_KEY": running.world.keys["alice"], "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{alice.text.text_content()}\n"


def test_neither_holds_the_key(alice: Visit, running: Running) -> None:
    for name in ("curl", "python"):
        code = alice.page.locator(f"#code-{name}").text_content() or ""
        assert "SEQR_API_KEY" in code and running.world.keys["alice"] not in code


def test_copy_puts_the_code_on_the_clipboard(fake: FakeGateway, user: Visit) -> None:
    user.context.grant_permissions(["clipboard-read", "clipboard-write"])
    user.ask("hi")
    user.finished(1)
    user.answers.get_by_role("button", name="As code").click()
    for name, label in (("curl", "Copy curl"), ("python", "Copy Python")):
        user.page.get_by_role("button", name=label).click()
        expect(user.page.get_by_role("status")).to_have_text("Copied.")
        copied = user.page.evaluate("navigator.clipboard.readText()")
        assert copied == user.page.locator(f"#code-{name}").text_content()
    assert KEY not in user.page.locator("dialog").inner_text()
    user.page.keyboard.press("Escape")
    expect(user.page.get_by_role("dialog")).to_be_hidden()


def test_without_a_clipboard_the_code_is_selected(fake: FakeGateway, user: Visit) -> None:
    user.page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    user.ask("hi")
    user.finished(1)
    user.answers.get_by_role("button", name="As code").click()
    user.page.get_by_role("button", name="Copy curl").click()
    expect(user.page.get_by_role("status")).to_contain_text("the text is selected, copy it by hand")
    selected = user.page.evaluate("getSelection().toString()")
    assert selected.split() == (user.page.locator("#code-curl").text_content() or "").split()
