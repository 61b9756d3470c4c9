"""The playground as its user sees it, in headless Chromium."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
PATIENCE_MS = 30_000
expect.set_options(timeout=PATIENCE_MS)


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """For a module that imports it. No longer: while Playwright runs, its thread has an event loop, in others' way."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with chromium() as running:
        yield running


class Visit:
    """One tab on the playground of the gateway at ``url``, and everything that went wrong in it."""

    def __init__(self, browser: Browser, url: str, **context: Any):
        self.url = url
        self.context: BrowserContext = browser.new_context(**context)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.problems: list[str] = []
        self.requested: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(f"{error}"))
        self.page.on("request", lambda request: self.requested.append(request.url))
        self.page.on("console", self._console)

    def _console(self, message: Any) -> None:
        # Chromium reports every HTTP error here as well; those are the tests' own.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.problems.append(message.text)

    def open(self) -> "Visit":
        self.page.goto(self.url)
        return self

    def log_in(self, key: str) -> "Visit":
        self.page.get_by_label("API key").fill(key)
        self.page.get_by_role("button", name="Log in").click()
        return self

    def ask(self, text: str) -> None:
        self.page.get_by_label("Message").fill(text)
        self.page.get_by_label("Message").press("Enter")

    @property
    def answers(self) -> Locator:
        return self.page.locator("article.answer")

    @property
    def text(self) -> Locator:
        """The text of the latest answer."""
        return self.answers.last.locator(".text")

    def finished(self, count: int) -> None:
        """Waits until ``count`` answers have ended, well or not."""
        expect(self.page.locator("article.answer:not([aria-busy])")).to_have_count(count)
        expect(self.page.get_by_role("button", name="Stop")).to_be_hidden()

    def switch(self, silo: str, of: str = "Silos") -> Locator:
        return self.page.get_by_role("group", name=of, exact=True).get_by_role("switch", name=silo)

    def close(self) -> None:
        self.context.close()


Visiting = Callable[..., Visit]
