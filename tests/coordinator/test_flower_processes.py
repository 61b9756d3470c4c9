"""Real Flower processes over TLS on loopback: what reaches whom, and what survives kill -9.

The silo's job handler is a stand-in that writes down what it was given and, if told to, takes its time. Everything else
is the product: the launcher, the job table, the fleet filter, the SuperNodes and their supervisors.
"""

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from coordinator import silos
from coordinator.certs import make_certificates
from coordinator.flower_nodes import FlowerNodes, NodeKeySpent
from coordinator.settings import make_settings
from seqr.supervisor import free_port
from tests.coordinator.flower_federation import (
    STAND_IN,
    Elsewhere,
    Federation,
    Silo,
    activate,
    descendants,
    find,
    hostile_app,
    until,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    federation = Federation(tmp_path_factory.mktemp("flower"))
    try:
        federation.start()
        federation.alpha.start()
        federation.beta.start()
        for job_id in [federation.enqueue(silo) for silo in (federation.alpha, federation.beta)]:
            assert federation.finish(job_id)["state"] == "succeeded"
        yield federation
    finally:
        federation.stop()


def test_an_order_reaches_the_named_silo_and_no_other(federation: Federation) -> None:
    before = len(federation.alpha.handled()), len(federation.beta.handled())
    job_id = federation.enqueue(federation.beta)
    assert federation.finish(job_id)["state"] == "succeeded"
    assert (len(federation.alpha.handled()), len(federation.beta.handled())) == (before[0], before[1] + 1)
    assert federation.beta.handled()[-1]["payloadType"] == "application/vnd.seqr.job+json"


def test_nothing_secret_stands_in_any_argument_and_nothing_phones_home(federation: Federation) -> None:
    launcher, silo = federation.launcher, federation.alpha.process
    assert launcher is not None and silo is not None
    (federation.alpha.folder / "pause").touch()
    job_id = federation.enqueue(federation.alpha)
    handled = len(federation.alpha.handled())
    until(lambda: len(federation.alpha.handled()) > handled, 60, "the start of the job")
    seen = descendants(launcher.pid) | descendants(silo.pid)
    names = set()
    for pid in seen:
        environment = (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0")
        arguments = (Path("/proc") / str(pid) / "cmdline").read_bytes().decode().split("\0")
        assert {b"FLWR_TELEMETRY_ENABLED=0", b"FLWR_DISABLE_UPDATE_CHECK=1"} <= set(environment), arguments
        assert "--token" not in arguments
        # Flower's task tokens and our secrets, in hexadecimal or base64, are longer than any word that belongs here.
        long = [word for word in arguments if re.fullmatch(r"[A-Za-z0-9+/=_-]{40,}", word)]
        assert all(word.startswith(("/", "--")) for word in long), arguments
        names |= {"superlink", "superexec", "serverapp", "supernode", "clientapp", "coordinator.fleet_proxy"} & set(
            arguments
        )
    (federation.alpha.folder / "pause").unlink()
    assert len(names) == 6
    assert federation.finish(job_id)["state"] == "succeeded"


def test_silos_reach_fleet_calls_and_nothing_else(federation: Federation) -> None:
    import ssl

    context = ssl.create_default_context(cafile=str(federation.ca_file))
    with httpx.Client(base_url=f"https://localhost:{federation.port}", verify=context) as client:
        for path in ("/v1/control/list-runs", "/v1/control/start-run", "/v1/runtime/acquire-task", "/docs", "/health"):
            assert client.post(path).status_code == 404
        unsigned = client.post("/v1/fleet/pull-messages", headers={"content-type": "application/protobuf"})
        assert unsigned.status_code == 401


def test_a_task_is_handed_to_nobody_without_the_executors_secret(federation: Federation) -> None:
    import ssl

    loopback_ca = federation.settings.directory / "flower" / "tls" / "ca.crt"
    context = ssl.create_default_context(cafile=str(loopback_ca))
    with httpx.Client(base_url=f"https://{federation.superlink}", verify=context) as client:
        answer = client.post("/v1/runtime/acquire-task", headers={"content-type": "application/protobuf"})
    assert answer.status_code == 401


def test_a_node_key_that_nobody_approved_is_refused(federation: Federation) -> None:
    assert activate(federation, ec.generate_private_key(ec.SECP384R1())) == 412


def test_a_suspended_silo_is_cut_off_and_its_key_is_not_taken_again(federation: Federation) -> None:
    site = federation.folder / "site"
    gamma = Silo(federation.folder, "gamma", federation.port, federation.ca_file, site)
    federation.approve(gamma)
    until(lambda: activate(federation, gamma.private_key) == 200, 30, "the registration of an approved key")
    silos.suspend(federation.coordinator.engine, "gamma", "test", "test")
    until(lambda: activate(federation, gamma.private_key) != 200, 30, "the end of the registration")
    with pytest.raises(NodeKeySpent, match=r"'gamma' .* restart `seqr coordinator flower`"):
        FlowerNodes(federation.settings).register("gamma", gamma.node_key)


def test_a_run_that_a_stranger_submits_is_not_executed_by_the_coordinator(federation: Federation) -> None:
    marker = federation.folder / "stranger-was-here"
    run_id = FlowerNodes(federation.settings).start_run(hostile_app(marker))
    log = federation.settings.directory / "flower" / "logs" / "superexec.log"
    until(lambda: "runs its own ServerApp" in log.read_text(errors="replace"), 20, "the refusal")
    FlowerNodes(federation.settings).stop_runs([run_id])
    assert not marker.exists()
    assert federation.finish(federation.enqueue(federation.alpha))["state"] == "succeeded"


def test_job_is_done_once_after_kill_of_the_server_app(federation: Federation) -> None:
    os.kill(federation.pid("serverapp"), signal.SIGKILL)
    assert_done_once(federation, federation.alpha, federation.enqueue(federation.alpha))


def test_job_is_done_once_after_kill_of_the_supernode_that_worked_on_it(federation: Federation) -> None:
    alpha = federation.alpha
    handled = len(alpha.handled())
    (alpha.folder / "pause").touch()
    job_id = federation.enqueue(alpha)
    until(lambda: len(alpha.handled()) > handled, 60, "the start of the job")
    worker = alpha.pid("clientapp")
    os.kill(alpha.pid("supernode"), signal.SIGKILL)
    until(lambda: not Path(f"/proc/{worker}").exists(), 20, "the end of the killed node's worker")
    (alpha.folder / "pause").unlink()
    assert federation.finish(job_id)["state"] == "succeeded"
    # The same order was given again, byte by byte, so that the silo can know it; and its reply was taken once.
    orders = alpha.handled()[handled:]
    assert len(orders) > 1 and all(order == orders[0] for order in orders)
    assert federation.job(job_id)["orders"] == 1
    assert federation.times_succeeded(job_id) == 1


def test_job_is_done_once_after_kill_of_the_superlink(federation: Federation) -> None:
    os.kill(federation.pid("superlink"), signal.SIGKILL)
    given = [(silo, federation.enqueue(silo)) for silo in (federation.alpha, federation.beta)]
    for silo, job_id in given:
        assert_done_once(federation, silo, job_id)


def assert_done_once(federation: Federation, silo: Silo, job_id: str) -> None:
    assert federation.finish(job_id)["state"] == "succeeded"
    done = [order for order in silo.handled() if job_id in json.dumps(decoded(order))]
    assert len(done) == 1


def decoded(envelope: dict[str, object]) -> object:
    import base64

    return json.loads(base64.b64decode(str(envelope["payload"])))


@pytest.mark.slow
def test_launcher_serves_a_superlink_that_runs_elsewhere(tmp_path: Path) -> None:
    federation = Federation(tmp_path)
    elsewhere = Elsewhere(tmp_path / "elsewhere", federation.port, federation.settings.certificates)
    directory = str(federation.settings.directory)
    try:
        elsewhere.superlink()
        executor = (sys.executable, "-m", "coordinator.flower_process", "superexec")
        tokens = str(tmp_path / "elsewhere" / "run" / "tokens")
        elsewhere.superexec(*executor, SEQR_COORDINATOR_DIRECTORY=directory, SEQR_FLOWER_TOKEN_DIR=tokens)
        federation.start(SEQR_COORDINATOR_SUPERLINK_ADDRESS=f"localhost:{federation.port}")
        federation.alpha.start()
        assert federation.finish(federation.enqueue(federation.alpha))["state"] == "succeeded"
        assert find("superlink", f"FLWR_HOME={directory}/flower/home") == []
    finally:
        federation.stop()
        elsewhere.stop()


def test_a_silo_runs_its_own_app_whatever_a_coordinator_sends(tmp_path: Path) -> None:
    """The whole other side is hostile: its SuperLink, its SuperExec and its app."""
    site, certificates = tmp_path / "site", tmp_path / "certificates"
    site.mkdir()
    (site / "sitecustomize.py").write_text(STAND_IN)
    make_certificates(certificates)
    hostile = Elsewhere(tmp_path / "hostile", free_port(), certificates)
    silo = Silo(tmp_path, "alpha", hostile.port, hostile.ca_file, site)
    marker = tmp_path / "client-mark"
    try:
        hostile.superlink()
        hostile.superexec(str(Path(sys.executable).parent / "flower-superexec"))
        home = tmp_path / "c" / "flower" / "home"
        home.mkdir(parents=True)
        text = f'[superlink.seqr]\naddress = "localhost:{hostile.port}"\nroot-certificates = "{hostile.ca_file}"\n'
        (home / "config.toml").write_text(text)
        nodes = FlowerNodes(make_settings(directory=tmp_path / "c"))
        nodes.register("alpha", silo.node_key)
        nodes.start_run(hostile_app(marker))
        silo.start()
        until(lambda: silo.handled(), 60, "the silo's own app")
    finally:
        silo.stop()
        hostile.stop()
    assert silo.handled() == [{"from": "stranger"}]
    assert not marker.exists()
    assert "another digest than this silo's own" in silo.log()
