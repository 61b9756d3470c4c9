"""A browser without a screen: it keeps cookies, follows the log-in and marks requests as the gateway's page does."""

from collections.abc import Mapping
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, urlsplit

import httpx

OWN_PAGE = {"X-Seqr-Session": "1", "Sec-Fetch-Site": "same-origin"}


class Browser:
    """At the gateway at ``url``."""

    def __init__(self, url: str):
        self.url = url
        self.http = httpx.Client(base_url=url, timeout=30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.http.close()

    def begin(self) -> str:
        """To the provider and back; returns the address that the provider sends the browser to."""
        asked = self.http.get("/auth/login")
        assert asked.status_code == 303
        back = httpx.get(asked.headers["location"])
        assert back.status_code == 303
        return str(back.headers["location"])

    def come_back(self, address: str) -> str:
        """Opens the callback; returns where on the gateway's page it leads, "/" after a log-in."""
        response = self.http.get(address)
        assert response.status_code == 303 and response.headers["cache-control"] == "no-store"
        assert response.headers["location"].startswith(self.url + "/")
        return str(response.headers["location"].removeprefix(self.url))

    def log_in(self) -> "Browser":
        assert self.come_back(self.begin()) == "/"
        return self

    def models(self, headers: Mapping[str, str] = OWN_PAGE) -> httpx.Response:
        return self.http.get("/v1/models", headers=dict(headers))

    @property
    def session(self) -> str:
        return self.http.cookies.get("seqr-session") or ""


def query(address: str) -> dict[str, str]:
    """The parameters of an address, each of which is there once."""
    return {name: value for name, [value] in parse_qs(urlsplit(address).query, strict_parsing=True).items()}
