"""A browser, a gateway without a model, and tabs that fail their test when the page logs an error."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect

from tests.inference_gateway.playground.browsing import Visit, Visiting, browser
from tests.inference_gateway.playground.fake_gateway import KEY, FakeGateway, Served

__all__ = ["browser"]


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[FakeGateway, str]]:
    fake = FakeGateway()
    server = Served(fake.app)
    yield fake, server.url
    server.stop()


@pytest.fixture
def fake(served: tuple[FakeGateway, str]) -> FakeGateway:
    served[0].reset()
    return served[0]


@pytest.fixture
def visiting(browser: Browser, served: tuple[FakeGateway, str]) -> Iterator[Visiting]:
    """Opens tabs on the playground; afterwards no tab may have logged an error or asked any other host."""
    opened: list[Visit] = []

    def visit(url: str = served[1], **context: object) -> Visit:
        opened.append(Visit(browser, url, **context).open())
        return opened[-1]

    yield visit
    problems = [problem for one in opened for problem in one.problems]
    foreign = [asked for one in opened for asked in one.requested if not asked.startswith(one.url)]
    for one in opened:
        one.close()
    assert problems == []
    assert foreign == []


@pytest.fixture
def user(fake: FakeGateway, visiting: Visiting) -> Visit:
    """A user of the gateway without a model, logged in."""
    visit = visiting().log_in(KEY)
    # The key is kept once it has been found good: a page that is loaded again before asks for it anew.
    expect(visit.page.get_by_label("Message")).to_be_visible()
    return visit
