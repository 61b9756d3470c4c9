"""[oidc] in gateway.toml: what is taken, what is refused before the gateway starts."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from inference_gateway.errors import SettingsInvalid
from inference_gateway.oidc.login import Oidc
from inference_gateway.oidc.settings import OidcSettings
from inference_gateway.settings import load_settings

LEAST = {"issuer": "https://login.example", "client_id": "seqr", "public_url": "https://gateway.example"}
ADDRESS = "must be an https:// address without user, query and fragment (http:// only for this machine itself)"


def loaded(directory: Path, table: str) -> OidcSettings | None:
    (directory / "gateway.toml").write_text(table)
    return load_settings(directory).oidc


def test_without_the_table_there_are_no_log_ins(tmp_path: Path) -> None:
    assert loaded(tmp_path, "port = 8080\n") is None


def test_three_settings_are_enough_and_the_rest_is_careful(tmp_path: Path) -> None:
    lines = "".join(f'{name} = "{value}"\n' for name, value in LEAST.items())
    settings = loaded(tmp_path, f"[oidc]\n{lines}")
    assert settings is not None
    assert settings.algorithms == ("RS256", "ES256", "EdDSA") and settings.user_claim == "sub"
    assert (settings.audience, settings.client_secret_file, settings.scopes) == (None, None, ("openid",))
    assert settings.session_hours == 8
    assert settings.redirect_uri == "https://gateway.example/auth/callback"


def test_the_table_in_the_operators_page_is_settings() -> None:
    page = (Path(__file__).parents[3] / "docs" / "operator.md").read_text()
    toml = re.search(r"```toml\n(\[oidc\].*?)```", page, re.DOTALL)
    assert toml is not None
    settings = OidcSettings(**tomllib.loads(toml[1])["oidc"])
    assert (settings.user_claim, settings.scopes) == ("preferred_username", ("openid", "profile"))
    table = page[toml.end() : page.index("Nobody is made by logging in")]
    assert [name for name in OidcSettings.model_fields if f"`{name}`" not in table] == []


def test_the_environment_can_bring_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQR_GATEWAY_OIDC", '{"issuer": "https://login.example", "client_id": "seqr"}')
    with pytest.raises(SettingsInvalid, match=r"oidc\.public_url: Field required"):
        loaded(tmp_path, "")
    settings = loaded(tmp_path, '[oidc]\npublic_url = "https://gateway.example"\n')
    assert settings is not None and settings.issuer == "https://login.example"


@pytest.mark.parametrize("missing", LEAST)
def test_a_table_that_lacks_what_tokens_are_checked_by_is_refused(tmp_path: Path, missing: str) -> None:
    lines = "".join(f'{name} = "{value}"\n' for name, value in LEAST.items() if name != missing)
    with pytest.raises(SettingsInvalid, match=rf"the gateway's settings are wrong: oidc\.{missing}: Field required"):
        loaded(tmp_path, f"[oidc]\n{lines}")


WRONG: dict[str, tuple[str, str]] = {
    'issuer = ""': ("issuer", ADDRESS),
    'issuer = "http://login.example"': ("issuer", ADDRESS),
    'issuer = "login.example"': ("issuer", ADDRESS),
    'issuer = "https://login.example?realm=1"': ("issuer", ADDRESS),
    'issuer = "https://user@login.example"': ("issuer", ADDRESS),
    'issuer = "https://127.0.0.1.example:x"': ("issuer", ADDRESS),
    'public_url = "http://192.0.2.1:8080"': ("public_url", ADDRESS),
    'public_url = "https://gateway.example/#/"': ("public_url", ADDRESS),
    'client_id = ""': ("client_id", "String should have at least 1 character"),
    'audience = ""': ("audience", "String should have at least 1 character"),
    "algorithms = []": ("algorithms", "at least 1 item"),
    'algorithms = ["none"]': ("algorithms.0", "Input should be 'RS256', 'RS384'"),
    'algorithms = ["RS256", "HS256"]': ("algorithms.1", "Input should be 'RS256', 'RS384'"),
    'user_claim = ""': ("user_claim", "String should have at least 1 character"),
    'scopes = ["email"]': ("scopes", 'must be single words, and one of them "openid"'),
    'scopes = ["openid", "two words"]': ("scopes", 'must be single words, and one of them "openid"'),
    "session_hours = 0": ("session_hours", "greater than 0"),
    "session_hours = 10000": ("session_hours", "less than or equal to 720"),
    'tenant = "x"': ("tenant", "Extra inputs are not permitted"),
}


@pytest.mark.parametrize("line", WRONG)
def test_a_setting_that_would_take_too_much_is_refused_by_name(tmp_path: Path, line: str) -> None:
    field, message = WRONG[line]
    others = [f'{name} = "{value}"' for name, value in LEAST.items() if not line.startswith(f"{name} =")]
    with pytest.raises(SettingsInvalid) as refusal:
        loaded(tmp_path, "\n".join(["[oidc]", *others, line]))
    assert f"oidc.{field}: " in str(refusal.value) and message in str(refusal.value)


@pytest.mark.parametrize("address", ["http://localhost:9000", "http://127.0.0.1:9000/realm", "http://[::1]:9000"])
def test_plain_http_is_for_this_machine_alone(address: str) -> None:
    assert OidcSettings(**(LEAST | {"issuer": address, "public_url": address})).issuer == address


@pytest.mark.parametrize(
    ("public_url", "origin"),
    [
        ("https://gateway.example", "https://gateway.example"),
        ("https://Gateway.Example:443/seqr/", "https://gateway.example"),
        ("https://gateway.example:8443", "https://gateway.example:8443"),
        ("http://[::1]:8080", "http://[::1]:8080"),
    ],
)
def test_the_origin_is_written_as_browsers_write_it(public_url: str, origin: str) -> None:
    assert OidcSettings(**(LEAST | {"public_url": public_url})).origin == origin


def test_a_page_under_a_path_keeps_it() -> None:
    settings = OidcSettings(**(LEAST | {"public_url": "https://gateway.example/seqr"}))
    assert settings.page == "https://gateway.example/seqr/"
    assert settings.redirect_uri == "https://gateway.example/seqr/auth/callback"


@pytest.mark.parametrize(
    ("setting", "content", "message"),
    [
        ("client_secret_file", None, "oidc.client_secret_file {} cannot be read; put the client's secret there"),
        ("client_secret_file", b" \n", "oidc.client_secret_file {} is empty; put the client's secret there"),
        ("client_secret_file", b"\xff", "oidc.client_secret_file {} cannot be read; put the client's secret there"),
        ("ca_file", None, "oidc.ca_file {} is not a certificate file: "),
        ("ca_file", b"no certificate", "oidc.ca_file {} is not a certificate file: "),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, setting: str, content: Any, message: str) -> None:
    path = tmp_path / "oidc.file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsInvalid) as refusal:
        Oidc(OidcSettings(**LEAST, **{setting: Path("oidc.file")}), tmp_path)
    assert str(refusal.value).startswith(message.format(path))
