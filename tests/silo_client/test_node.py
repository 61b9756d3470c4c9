"""`seqr silo run`: what it starts, what it starts it with, and what it refuses. No Flower process is started here."""

import fcntl
import itertools
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from silo_client import node
from silo_client.config import SiloConfig, load_config
from silo_client.errors import ConfigInvalid, SiloBusy
from silo_client.flower_process import FLOWER_VERSION, FlowerVersionUnsupported, refuse_other_versions
from silo_client.thin_app import FILES, build_thin_app

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path) -> SiloConfig:
    state = tmp_path / "state"
    state.mkdir()
    (state / "node.key").write_text("a key")
    (tmp_path / "ca.crt").write_text("a certificate")
    (tmp_path / "silo.toml").write_text(
        'silo_id = "alpha"\nbase_model = "base"\n[coordinator]\npublic_key = "key"\n'
        '[superlink]\naddress = "federation.example.org:8444"\nca_file = "ca.crt"\n[[data]]\npath = "records.jsonl"\n'
    )
    return load_config(tmp_path)


def services(config: SiloConfig) -> dict[str, Any]:
    return {service.name: service for service in node.supervise(config).services}


def test_node_key_and_ca_reach_the_supernode_as_paths_and_its_port_is_on_loopback(config: SiloConfig) -> None:
    command = list(services(config)["supernode"].command())
    given = dict(itertools.pairwise(command))
    assert given["--superlink"] == "federation.example.org:8444"
    assert given["--auth-supernode-private-key"] == str(config.state_dir / "node.key")
    assert given["--root-certificates"] == str(config.directory / "ca.crt")
    assert given["--host"] == "127.0.0.1" and given["--isolation"] == "process"
    assert "a key" not in command and "--insecure" not in command


def test_superexec_gets_the_port_of_the_present_supernode(config: SiloConfig) -> None:
    both = services(config)
    ports = set()
    for _ in range(3):
        supernode = list(both["supernode"].command())
        superexec = list(both["superexec"].command())
        port = supernode[supernode.index("--port") + 1]
        assert superexec[superexec.index("--runtime-api-address") + 1] == f"127.0.0.1:{port}"
        ports.add(port)
    assert len(ports) > 1


def test_the_executors_secret_is_new_at_every_start_and_private(config: SiloConfig) -> None:
    secret = config.state_dir / "flower" / "superexec.secret"
    seen = set()
    for _ in range(3):
        node.supervise(config)
        seen.add(secret.read_bytes())
        assert secret.stat().st_mode & 0o777 == 0o600
    assert len(seen) == 3 and all(len(each) == 48 for each in seen)
    assert (config.state_dir / "flower").stat().st_mode & 0o777 == 0o700


def test_nothing_phones_home_from_any_process_of_a_silo(config: SiloConfig) -> None:
    for service in services(config).values():
        assert service.environment["FLWR_TELEMETRY_ENABLED"] == "0"
        assert service.environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
        assert service.environment["HF_HUB_OFFLINE"] == "1"
        assert service.environment["FLWR_HOME"] == str(config.state_dir / "flower" / "home")
        assert service.environment["SEQR_SILO_DIRECTORY"] == str(config.directory)


def test_loopback_connections_do_not_go_through_the_owners_proxy(
    config: SiloConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", "intranet")
    for service in services(config).values():
        assert service.environment["NO_PROXY"] == "intranet,127.0.0.1,localhost"


def test_an_app_left_by_an_earlier_run_is_removed(config: SiloConfig) -> None:
    planted = config.state_dir / "flower" / "home" / "apps" / "seqr.seqr-flower.1.0.0.0f3e3e67"
    planted.mkdir(parents=True)
    node.supervise(config)
    assert not planted.exists()


def test_a_silo_that_runs_already_is_not_started_twice(config: SiloConfig) -> None:
    with open(config.state_dir / "run.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SiloBusy, match="already running"):
            node.run(config)


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ('address = "federation.example.org:8444"\n', "", "needs an address"),
        ('ca_file = "ca.crt"\n', "", "needs an address"),
        ("ca.crt", "missing.crt", "CA certificate"),
    ],
)
def test_missing_connection_settings_are_named(config: SiloConfig, old: str, new: str, what: str) -> None:
    file = config.directory / "silo.toml"
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(ConfigInvalid, match=what):
        node.supervise(load_config(config.directory))


def test_a_silo_without_node_key_is_told_to_initialise(config: SiloConfig) -> None:
    (config.state_dir / "node.key").unlink()
    with pytest.raises(ConfigInvalid, match=r"node key .*'seqr silo init' in a new directory and enrol"):
        node.supervise(config)


def test_the_owner_is_told_in_words_why_the_coordinator_does_not_let_the_silo_in(
    config: SiloConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = "import sys; print('Exit Code: 305'); sys.exit(1)"
    monkeypatch.setattr(node, "_python", lambda *_: ["python3", "-c", refused])
    said: list[str] = []
    supervisor = node.supervise(config, said.append)
    watching = threading.Thread(target=supervisor.watch, args=(0.1,))
    watching.start()
    log = config.state_dir / "flower" / "flower.log"
    try:
        while not said or log.read_bytes().count(b"Exit Code") < 3:
            assert watching.is_alive()
            time.sleep(0.05)
    finally:
        supervisor.request_stop()
        watching.join(20)
        supervisor.stop()
    # Once, however often it is tried again.
    assert said == [
        "supernode: the coordinator does not let this silo in: 'seqr silo enrol' asks to join, an admin approves; "
        "or its last connection has not timed out yet; trying again"
    ]
    assert os.stat(config.state_dir / "flower" / "flower.log").st_mode & 0o777 == 0o600


def test_the_silos_own_app_is_the_one_in_the_coordinators_folder() -> None:
    from coordinator.flower_process import build_app

    folder = ROOT / "coordinator" / "flower_app"
    present = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert set(present) == set(FILES)
    assert {name: data for name, data in present.items() if name.endswith(".py")} == {
        name: data for name, data in FILES.items() if name.endswith(".py")
    }
    assert build_app() == build_thin_app().content


def test_another_flower_than_the_known_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import flwr.supercore.version

    refuse_other_versions()
    monkeypatch.setattr(flwr.supercore.version, "package_version", "1.42.0")
    with pytest.raises(FlowerVersionUnsupported, match=FLOWER_VERSION):
        refuse_other_versions()
