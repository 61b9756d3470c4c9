"""The command line's view of the REST API: one call, and its problem documents as errors with their own code."""

import json
import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from coordinator.errors import RemoteProblem, RemoteUnreachable, SettingsInvalid
from seqr.settings import is_loopback, is_safe_url

Url = Annotated[str, typer.Option("--url", envvar="SEQR_COORDINATOR_URL", help="Address of the coordinator.")]
KeyFile = Annotated[
    Path, typer.Option("--key-file", envvar="SEQR_COORDINATOR_KEY_FILE", help="File that holds your API key.")
]
CaFile = Annotated[
    Path | None,
    typer.Option("--ca-file", envvar="SEQR_COORDINATOR_CA_FILE", help="CA certificate, if not a public one."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
DEFAULT_URL = "https://127.0.0.1:8443"


@dataclass(frozen=True)
class Remote:
    """A coordinator somewhere, and the key to speak with it."""

    url: str
    key_file: Path
    ca_file: Path | None

    def call(self, method: str, path: str, body: dict[str, Any] | None = None, **query: str | None) -> Any:
        """The JSON answer. Raises RemoteProblem, RemoteUnreachable, SettingsInvalid."""
        return json.loads(self.fetch(method, path, body, **query))

    def fetch(self, method: str, path: str, body: dict[str, Any] | None = None, **query: str | None) -> bytes:
        """The answer's bytes."""
        import httpx

        headers = {"Authorization": f"Bearer {self._key()}"}
        params = {name: value for name, value in query.items() if value is not None}
        try:
            with httpx.Client(verify=self._trust(), timeout=60, trust_env=not is_loopback(self.url)) as client:
                response = client.request(
                    method, self.url.rstrip("/") + path, json=body, params=params, headers=headers
                )
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            why = str(error) or type(error).__name__
            raise RemoteUnreachable(f"the coordinator at {self.url} does not answer: {why}") from None
        if response.is_success:
            return response.content
        raise _problem(response.status_code, response.content)

    def _key(self) -> str:
        try:
            return self.key_file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            raise SettingsInvalid(f"the API key file {self.key_file} cannot be read; give --key-file") from None

    def _trust(self) -> ssl.SSLContext:
        if not is_safe_url(self.url):
            raise SettingsInvalid(
                "an API key is sent to an https:// address only, or to an http:// one of this machine; see --url"
            )
        try:
            return ssl.create_default_context(cafile=None if self.ca_file is None else os.fspath(self.ca_file))
        except (OSError, ssl.SSLError):
            raise SettingsInvalid(f"the CA certificate {self.ca_file} cannot be read; give --ca-file") from None


def _problem(status: int, content: bytes) -> RemoteProblem:
    try:
        document = json.loads(content)
        return RemoteProblem(str(document["code"]), str(document["detail"]))
    except (ValueError, KeyError, TypeError):
        return RemoteProblem("http_error", f"the coordinator answered with status {status} and no explanation")


def show(value: Any, as_json: bool, columns: tuple[str, ...]) -> None:
    """Print a list as a table of ``columns``, a mapping as lines, or either as JSON."""
    if as_json:
        typer.echo(json.dumps(value, indent=2, ensure_ascii=False))
    elif isinstance(value, list):
        _table(value, columns)
    else:
        width = max((len(name) for name in columns), default=0)
        for name in columns:
            if value.get(name) is not None:
                typer.echo(f"{name:<{width}}  {_text(value[name])}")


def _table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    cells = [list(columns)] + [[_text(row.get(name)) for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
