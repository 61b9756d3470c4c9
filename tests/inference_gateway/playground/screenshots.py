"""Makes the pictures of docs/playground.md: python -m tests.inference_gateway.playground.screenshots FOLDER

The answers are scripted: the gateway behind these pages has no model.
"""

import sys
from pathlib import Path

from playwright.sync_api import Browser

from tests.inference_gateway.playground.browsing import Visit, chromium
from tests.inference_gateway.playground.fake_gateway import KEY, FakeGateway, Refusal, Served, words

QUESTION = "My mother was prescribed metformin. Does her insurance at the bank cover a second opinion?"
ANSWERS = [
    "Metformin is usually the first medicine for type 2 diabetes. Her account comes with travel cover only, so a "
    "second opinion is paid by the health plan; ask the clinic for a referral first.",
    "Her account comes with travel cover only. The bank cannot say which treatments a health plan pays for.",
]
DESKTOP = {"width": 1200, "height": 720}
PHONE = {"width": 390, "height": 780}


def asked(browser: Browser, url: str, fake: FakeGateway, scheme: str, **viewport: int) -> Visit:
    fake.reset()
    user = Visit(browser, url, viewport=viewport, color_scheme=scheme).open().log_in(KEY)
    fake.script = words(ANSWERS[0], fake.silos)
    user.ask(QUESTION)
    user.finished(1)
    return user


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    fake = FakeGateway()
    server = Served(fake.app)

    def save(user: Visit, name: str) -> None:
        user.page.wait_for_timeout(300)  # transitions
        user.page.screenshot(path=folder / f"{name}.png")
        user.close()

    with chromium() as browser:
        guest = Visit(browser, server.url, viewport={"width": 1200, "height": 560}, color_scheme="light").open()
        guest.log_in("seqr_mistyped")
        guest.page.get_by_role("alert").wait_for()
        save(guest, "login")

        fake.issuer = "login.example.org"
        guest = Visit(browser, server.url, viewport={"width": 1200, "height": 480}, color_scheme="light").open()
        guest.page.get_by_role("link", name="Log in with login.example.org").wait_for()
        save(guest, "login-provider")

        for scheme in ("light", "dark"):
            user = asked(browser, server.url, fake, scheme, **DESKTOP)
            user.text.get_by_text("account").click()
            save(user, f"chat-{scheme}")

        user = asked(browser, server.url, fake, "light", **DESKTOP)
        user.page.get_by_role("button", name="New chat").click()
        user.page.get_by_role("switch", name="Compare sets").click()
        user.switch("clinic", "Set B").click()
        user.switch("school", "Set B").click()
        fake.script = None
        fake.by_set = lambda silos: words(ANSWERS[len(silos) == 1], silos)
        user.ask(QUESTION)
        user.finished(2)
        save(user, "compare")

        fake.by_set = None
        user = asked(browser, server.url, fake, "light", **DESKTOP)
        fake.refusals = [Refusal(429, "rate_limited", "this key may ask 10 times a minute", {"Retry-After": "24"})]
        user.ask("And what does it cost?")
        user.finished(2)
        save(user, "error")

        user = asked(browser, server.url, fake, "light", **DESKTOP)
        user.answers.get_by_role("button", name="As code").click()
        save(user, "code")

        user = asked(browser, server.url, fake, "dark", **PHONE)
        save(user, "phone")
        user = asked(browser, server.url, fake, "light", **PHONE)
        user.text.get_by_text("account").click()
        save(user, "phone-scores")
    server.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
