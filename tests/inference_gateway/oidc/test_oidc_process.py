"""Log-ins at a gateway that runs as a process of its own, from its gateway.toml."""

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from seqr.cli import main
from tests.inference_gateway.conftest import World, wait_until
from tests.inference_gateway.oidc.browser import Browser, query
from tests.inference_gateway.oidc.provider import CLIENT, Provider
from tests.inference_gateway.test_process import serve, write_toml

# Nobody listens there: the gateway waits for its coordinator, and knows already who is asking.
NO_COORDINATOR = "http://127.0.0.1:9"


def configure(world: World, *lines: str) -> str:
    """Writes gateway.toml with these lines of [oidc]; returns the gateway's address."""
    url = f"http://127.0.0.1:{write_toml(world, NO_COORDINATOR)}"
    with world.settings.config_file.open("a") as file:
        file.write("\n".join(["[oidc]", f'client_id = "{CLIENT}"', f'public_url = "{url}"', *lines]) + "\n")
    return url


def test_a_gateway_takes_log_ins_from_its_settings_and_logs_no_secret(
    make_world: Callable[[Path], World], provider: Provider, tmp_path: Path
) -> None:
    world = make_world(tmp_path / "gateway")
    secret = world.settings.directory / "oidc.secret"
    secret.write_text("s3cret-of-the-client\n")
    provider.secret = "s3cret-of-the-client"
    url = configure(world, f'issuer = "{provider.issuer}"', 'client_secret_file = "oidc.secret"')
    process = serve(world.settings.directory)
    try:
        wait_until(lambda: alive(url), 120)
        with Browser(url) as browser:
            back = browser.begin()
            assert browser.come_back(back) == "/"
            token = provider.token()
            by_token = browser.models({"Authorization": f"Bearer {token}"})
            for response in (browser.models(), by_token):
                assert (response.status_code, response.json()["error"]["code"]) == (503, "not_ready")
            assert browser.models({"Authorization": f"Bearer {token}x"}).status_code == 401
            session = browser.session
    finally:
        process.terminate()
        process.wait(30)
    log = (world.settings.directory / "gateway.log").read_text()
    assert "/auth/callback" in log and "alice" in log
    form = provider.forms[-1]
    secrets = (
        *token.split(".")[1:],
        session,
        form["code"],
        form["code_verifier"],
        query(back)["state"],
        provider.secret,
    )
    assert not [one for one in secrets if one in log]


def alive(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def test_a_gateway_whose_issuer_is_not_set_does_not_start(
    make_world: Callable[[Path], World], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = make_world(tmp_path / "gateway")
    configure(world)
    with pytest.raises(SystemExit) as end:
        main(["gateway", "serve", "--dir", str(world.settings.directory)])
    told = capsys.readouterr().err
    assert end.value.code == 1
    assert told.startswith("error[settings_invalid]: the gateway's settings are wrong: oidc.issuer: Field required")


def test_a_gateway_without_its_clients_secret_does_not_start(
    make_world: Callable[[Path], World], provider: Provider, tmp_path: Path
) -> None:
    world = make_world(tmp_path / "gateway")
    configure(world, f'issuer = "{provider.issuer}"', 'client_secret_file = "oidc.secret"')
    assert serve(world.settings.directory).wait(120) == 1
    told = (world.settings.directory / "gateway.log").read_text()
    assert "error[settings_invalid]: oidc.client_secret_file" in told and "Traceback" not in told
