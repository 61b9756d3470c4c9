"""The gateway as a process of its own: made by `init`, run by `serve`, killed without warning, refused by name."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from inference_gateway.coordinator_client import CoordinatorClient
from inference_gateway.service import Service
from inference_gateway.settings import load_settings, require_complete, require_tls
from seqr.cli import main
from seqr.keys import SealingKey, SigningKey
from seqr.plan import GatewayKey, Plan, create_plan, sign_plan
from seqr.supervisor import free_port
from tests.inference_gateway.conftest import World, wait_until
from tests.inference_gateway.fake_coordinator import API_KEY, FakeCoordinator
from tests.inference_gateway.support import random_adapter, run

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "Where is the red boat?"}], "max_tokens": 8}


def serve(directory: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "seqr", "gateway", "serve", "--dir", str(directory)]
    with (directory / "gateway.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture
def on_loopback() -> Iterator[Callable[[FakeCoordinator], str]]:
    """Serves a coordinator on a port of its own."""
    servers: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(coordinator: FakeCoordinator) -> str:
        server = uvicorn.Server(uvicorn.Config(coordinator.app, port=0, ws="none", log_config=None))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        servers.append((server, thread))
        wait_until(lambda: server.started)
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join(timeout=10)


def write_toml(world: World, url: str, **changes: Any) -> int:
    """A gateway.toml for this world; returns the port."""
    port = free_port()
    settings = world.settings
    values = {
        "coordinator_url": url,
        "coordinator_public_key": settings.coordinator_public_key,
        "policy_database_url": settings.policy_database_url,
        "base_model": str(settings.base_model),
        "port": port,
        "poll_seconds": 0.1,
        "max_concurrent": 4,
        "max_batch_tokens": 64,
        "kv_tokens": 2048,
        "threads": 1,
    } | changes
    text = "\n".join(f"{name} = {json.dumps(value)}" for name, value in values.items())
    settings.config_file.write_text(text + "\n", encoding="utf-8")
    return port


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def test_after_kill_9_the_gateway_fetches_the_active_revisions_and_serves_again(
    make_world: Callable[[Path], World],
    on_loopback: Callable[[FakeCoordinator], str],
    plan: Plan,
    tmp_path: Path,
) -> None:
    world = make_world(tmp_path / "gateway")
    world.grant("alice", "alpha")
    row = world.coordinator.stage("alpha", 1, random_adapter(plan, 0))
    port = write_toml(world, on_loopback(world.coordinator))
    url = f"http://127.0.0.1:{port}"
    headers = {"Authorization": f"Bearer {world.keys['alice']}"}

    def answer() -> Any:
        return httpx.post(f"{url}/v1/chat/completions", json=BODY, headers=headers, timeout=30).json()["choices"]

    def loaded() -> bool:
        models = httpx.get(f"{url}/v1/models", headers=headers, timeout=5).json()["data"]
        return [model["id"] for model in models] == ["tiny", "silo:alpha"]

    process = serve(world.settings.directory)
    try:
        wait_until(lambda: ready(url) and loaded(), 120)
        assert row.state == "active"
        before = answer()
        long = BODY | {"max_tokens": 400, "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=long, headers=headers, timeout=30) as response:
            next(response.iter_lines())
            process.kill()
        process.wait()
        process = serve(world.settings.directory)
        wait_until(lambda: ready(url), 120)
        assert loaded() and answer() == before
        assert [r.state for r in world.coordinator.revisions.values()] == ["active"]
    finally:
        process.kill()
        process.wait()
    stored = [p for p in world.settings.directory.rglob("*") if p.is_file() and p.suffix != ".log"]
    window = next(iter(random_adapter(plan, 0).modules.values())).q.numpy().tobytes()[:64]
    assert not any(window in path.read_bytes() for path in stored)  # adapters live in memory only


def test_limits_and_json_logs_are_set_in_the_toml(
    make_world: Callable[[Path], World], on_loopback: Callable[[FakeCoordinator], str], tmp_path: Path
) -> None:
    world = make_world(tmp_path / "gateway")
    port = write_toml(world, on_loopback(world.coordinator), log_format="json", max_prompt_tokens=400)
    with world.settings.config_file.open("a") as toml:
        toml.write("[limits.user]\nrequests_per_minute = 2\n")
    url = f"http://127.0.0.1:{port}"
    headers = {"Authorization": f"Bearer {world.keys['carol']}", "X-Request-Id": "asked-once"}
    process = serve(world.settings.directory)
    try:
        wait_until(lambda: ready(url), 120)
        answers = [httpx.post(f"{url}/v1/chat/completions", json=BODY, headers=headers, timeout=30) for _ in range(3)]
        process.terminate()  # a request's line is written after its answer
        process.wait(60)
    finally:
        process.kill()
        process.wait()
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    text = (world.settings.directory / "gateway.log").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    told = [(line["status"], line["user"]) for line in lines if line.get("request_id") == "asked-once"]
    assert told == [(200, "carol"), (200, "carol"), (429, "carol")]
    assert "red boat" not in text and not any(line["logger"] == "uvicorn.access" for line in lines)


class Command:
    """``seqr gateway ...`` in this process: its exit status and what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]):
        self._capsys = capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        status: Any = 0
        try:
            main(["gateway", *arguments])
        except SystemExit as end:
            status = end.code or 0
        out, err = self._capsys.readouterr()
        return int(status), out, err


@pytest.fixture
def seqr(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


def test_init_makes_private_keys_and_a_public_file_once(seqr: Command, tmp_path: Path) -> None:
    status, out, err = seqr(
        "init", "--dir", str(tmp_path / "g"), "--coordinator-url", "https://c", "--port", "9000", "--json"
    )
    assert status == 0, err
    public = json.loads(out)
    file = json.loads((tmp_path / "g" / "gateway-key.json").read_text())
    assert file == {name: public[name] for name in ("key_id", "sealing_key", "signing_key")}
    assert GatewayKey(**file).key_id == SealingKey.load(tmp_path / "g" / "sealing.key").public.key_id
    assert SigningKey.load(tmp_path / "g" / "signing.key").public.to_b64() == file["signing_key"]
    assert [(tmp_path / "g" / f"{n}.key").stat().st_mode & 0o777 for n in ("signing", "sealing")] == [0o600, 0o600]
    toml = (tmp_path / "g" / "gateway.toml").read_text()
    assert 'coordinator_url = "https://c"' in toml and "port = 9000" in toml
    status, _, err = seqr("init", "--dir", str(tmp_path / "g"))
    assert status == 1 and err.startswith("error[key_file_exists]:")


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("", "coordinator_url, coordinator_public_key, policy_database_url, base_model must be set"),
        ("colour = 3", "colour"),
        ("port = [", "not valid TOML"),
        ("max_concurrent = 0", "max_concurrent"),
        ("max_concurrent_per_user = 0", "max_concurrent_per_user"),
        ("[limits.user]\nrequests_per_minute = 0", "limits.user.requests_per_minute: Input should be greater"),
        ("[limits.key]\nspeed = 3", "limits.key.speed"),
        ("request_timeout_seconds = 0", "request_timeout_seconds"),
        ("queue_timeout_seconds = -1", "queue_timeout_seconds"),
        ('log_format = "xml"', "log_format: Input should be 'text' or 'json'"),
        ('allow_plain_http = "maybe"', "allow_plain_http"),
    ],
)
def test_settings_that_cannot_be_are_named_in_one_sentence(seqr: Command, tmp_path: Path, toml: str, said: str) -> None:
    (tmp_path / "gateway.toml").write_text(toml)
    status, _, err = seqr("serve", "--dir", str(tmp_path))
    assert status == 1 and err.startswith("error[settings_invalid]:") and said in err


def test_the_key_for_the_coordinator_is_sent_over_tls_or_to_this_machine_only(
    seqr: Command, make_world: Callable[[Path], World], tmp_path: Path
) -> None:
    world = make_world(tmp_path / "gateway")
    write_toml(world, "http://10.0.0.1:8443")
    status, _, err = seqr("serve", "--dir", str(world.settings.directory))
    assert status == 1 and err.startswith(
        "error[settings_invalid]: coordinator_url must be https:// (or http:// to this machine), got "
        "'http://10.0.0.1:8443': this gateway's API key would cross the network in the clear"
    )
    for safe in ("https://10.0.0.1:8443", "http://127.0.0.1:8443", "http://[::1]:8443"):
        write_toml(world, safe)
        require_complete(load_settings(world.settings.directory))


def test_plain_http_is_for_loopback_or_behind_a_proxy_only(
    seqr: Command, make_world: Callable[[Path], World], tmp_path: Path
) -> None:
    world = make_world(tmp_path / "gateway")
    write_toml(world, "https://c", host="10.0.0.1")
    status, _, err = seqr("serve", "--dir", str(world.settings.directory))
    assert status == 1 and err.startswith(
        "error[tls_required]: listening on 10.0.0.1 without TLS would send API keys in the clear; set ssl_certfile and "
        "ssl_keyfile (`seqr coordinator certs` makes a pair), or allow_plain_http behind a TLS proxy"
    )
    for allowed in ({"allow_plain_http": True}, {"ssl_certfile": "c", "ssl_keyfile": "k"}):
        require_tls(load_settings(world.settings.directory, host="10.0.0.1", **allowed))
    require_tls(load_settings(world.settings.directory, host="127.0.0.1"))


def other_model(plan: Plan) -> Plan:
    return remade(plan, base_model_digest="sha256:" + "0" * 64)


def other_gateway(plan: Plan) -> Plan:
    return remade(plan, gateway_keys=[GatewayKey.of(SealingKey.generate().public, SigningKey.generate().public)])


def remade(plan: Plan, **changes: Any) -> Plan:
    names = ("federation", "base_model", "base_model_digest", "modules", "rank", "alpha", "seed", "gateway_keys")
    return create_plan(**{**{name: getattr(plan, name) for name in names}, **changes})


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (other_model, "base_model_mismatch"),
        (other_gateway, "gateway_key_not_in_plan"),
        (None, "plan_signature_invalid"),
    ],
)
def test_a_plan_that_is_not_for_this_gateway_ends_it_by_name(
    make_world: Callable[[Path], World], plan: Plan, tmp_path: Path, spoil: Callable[[Plan], Plan] | None, code: str
) -> None:
    world = make_world(tmp_path / "gateway")
    key = world.coordinator.key if spoil else SigningKey.generate()
    world.coordinator.envelope = sign_plan(spoil(plan) if spoil else plan, key)
    client = CoordinatorClient("http://c", API_KEY, transport=httpx.ASGITransport(app=world.coordinator.app))

    async def come_up() -> Service:
        service = Service(world.settings, client)
        service.start()
        await service.failed.wait()
        assert service.problem() is not None
        await service.stop()
        return service

    failure = run(come_up()).failure
    assert failure is not None and failure.code == code


def test_an_unforeseen_error_at_the_start_is_logged_and_ends_the_gateway(
    make_world: Callable[[Path], World],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def unforeseen(*_: Any) -> None:
        raise RuntimeError("no memory left on the device")

    monkeypatch.setattr("seqr.models.load_base_model", unforeseen)
    world = make_world(tmp_path / "gateway")
    client = CoordinatorClient("http://c", API_KEY, transport=httpx.ASGITransport(app=world.coordinator.app))

    async def come_up() -> Service:
        service = Service(world.settings, client)
        service.start()
        await service.failed.wait()
        assert service.problem() == "it could not start (start_failed)"
        await service.stop()
        return service

    failure = run(come_up()).failure
    assert failure is not None and failure.code == "start_failed"
    assert str(failure) == (
        "the gateway cannot start because of an unexpected RuntimeError: no memory left on the device"
    )
    told = [record for record in caplog.records if record.message == "the gateway cannot start"]
    assert len(told) == 1 and told[0].exc_info
