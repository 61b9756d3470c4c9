"""The page and its files over HTTP."""

import re
from pathlib import Path

import httpx
import pytest

from inference_gateway import playground
from inference_gateway.app import create_app
from inference_gateway.service import Service
from tests.inference_gateway.conftest import Running
from tests.inference_gateway.support import run

STATIC = Path(playground.__file__).parent / "static"


def test_the_page_and_all_it_loads_come_without_a_key(running: Running) -> None:
    page = running.http().get("/")
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    loads = re.findall(r'(?:src|href)="(playground/[^"]+)"', page.text)
    assert sorted(loads) == ["playground/icon.svg", "playground/main.js", "playground/style.css"]
    for name in {file.name for file in STATIC.iterdir()} - {"index.html"}:
        response = running.http().get(f"/playground/{name}")
        assert response.status_code == 200 and response.content == (STATIC / name).read_bytes()
        assert response.headers["content-type"].split(";")[0] in ("text/javascript", "text/css", "image/svg+xml")


@pytest.mark.parametrize("path", ["/", "/playground/main.js", "/playground/icon.svg"])
def test_the_content_security_policy_allows_this_gateway_alone_and_nothing_inline(running: Running, path: str) -> None:
    headers = running.http().get(path).headers
    rules = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
    assert rules == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "connect-src": "'self'",
        "img-src": "'self' data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"


def test_no_file_names_another_host_or_turns_text_into_markup() -> None:
    for file in STATIC.iterdir():
        text = file.read_text(encoding="utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?://|innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text), (
            file.name
        )
        assert not re.search(r"localStorage|document\.cookie|indexedDB", text), file.name
    assert not re.search(r"<style|style=|<script(?![^>]*src=)|\son\w+=", (STATIC / "index.html").read_text())


def test_an_unchanged_file_is_not_sent_again_and_every_visit_asks(running: Running) -> None:
    first = running.http().get("/playground/main.js")
    assert first.headers["cache-control"] == "no-cache"
    again = running.http().get("/playground/main.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"])
    other = running.http().get("/playground/style.css", headers={"If-None-Match": first.headers["etag"]})
    assert other.status_code == 200
    head = running.http().head("/")
    assert (head.status_code, head.content) == (200, b"") and int(head.headers["content-length"]) > 0


@pytest.mark.parametrize(
    "path",
    ["/playground/nothing.js", "/playground/index.html", "/playground/__init__.py", "/playground/..%2F__init__.py"],
)
def test_what_is_no_file_of_the_page_is_not_found(running: Running, path: str) -> None:
    response = running.http().get(path)
    assert response.status_code == 404 and response.json()["error"]["code"] == "http_404"


def test_the_page_is_the_same_for_everybody_and_says_nothing_of_silos(running: Running) -> None:
    page = running.http().get("/").text
    assert {running.http(user).get("/").text for user in ("alice", "bob", "carol")} == {page}
    assert not re.search("alpha|beta|gamma|tiny", page)


def test_without_the_setting_there_is_no_page_and_the_api_is_still_there(running: Running) -> None:
    app = create_app(Service(running.world.settings.model_copy(update={"playground": False})))

    async def statuses() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://gateway") as client:
            paths = ("/", "/playground/main.js", "/healthz", "/v1/models")
            return [(await client.get(path)).status_code for path in paths]

    assert run(statuses()) == [404, 404, 200, 401]


def test_the_page_is_no_part_of_the_interfaces_description(running: Running) -> None:
    described = create_app(Service(running.world.settings)).openapi()["paths"]
    assert "/v1/models" in described
    assert not [path for path in described if path == "/" or "playground" in path]


def test_the_files_are_part_of_the_package() -> None:
    assert {"index.html", "main.js", "style.css", "icon.svg"} <= set(playground.read_static_files())
