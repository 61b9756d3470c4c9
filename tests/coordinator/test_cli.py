"""The command line: an operator's setup from nothing, and admins' commands over TLS against a served coordinator."""

import json
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from cryptography import x509

from coordinator.api import create_app
from coordinator.certs import make_certificates
from coordinator.commands.client import Remote
from coordinator.deletions import State
from coordinator.errors import CertificateExists, InsecureListen, RemoteUnreachable, SettingsInvalid
from coordinator.revisions import RevisionState
from coordinator.serve import require_tls
from coordinator.settings import Settings, load_settings, make_settings
from seqr.cli import main
from seqr.dsse import Envelope
from seqr.keys import VerifyKey
from seqr.models import base_model_digest
from seqr.plan import verify_plan
from seqr.tiny_model import build_tiny_model
from tests.coordinator.world import Gateway, Silo, World

Run = Callable[..., Any]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs ``seqr coordinator ...`` and returns what it printed; ``fails`` is the error code that is expected."""

    def call(*arguments: str | Path, fails: str | None = None) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["coordinator", *map(str, arguments)])
        printed = capsys.readouterr()
        if fails is None:
            assert not ended.value.code, printed.err
        else:
            assert ended.value.code == 1 and printed.err.startswith(f"error[{fails}]: "), printed.err
            assert printed.err.count("\n") == 1, "one sentence, no traceback"
        return printed.out

    return call


@pytest.fixture
def served(world: World, tmp_path: Path) -> Iterator[list[str | Path]]:
    """The options that reach a coordinator behind TLS as an admin who is a privacy officer too."""
    make_certificates(tmp_path / "certs")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(
            create_app(world.c, world.nodes),
            ssl_certfile=tmp_path / "certs" / "server.crt",
            ssl_keyfile=tmp_path / "certs" / "server.key",
            log_level="error",
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        key = tmp_path / "ada.key"
        key.write_text(world.key("ada", "admin", "deletions") + "\n")
        url = f"https://127.0.0.1:{listener.getsockname()[1]}"
        yield ["--url", url, "--key-file", key, "--ca-file", tmp_path / "certs" / "ca.crt"]
        server.should_exit = True
        thread.join()


def test_an_operator_gets_from_nothing_to_a_signed_plan(run: Run, tmp_path: Path) -> None:
    state, model = tmp_path / "state", build_tiny_model(tmp_path / "model")
    told = json.loads(run("init", "--dir", state, "--federation", "hospitals", "--json"))
    run("certs", "--dir", state, "--name", "coordinator.example", "--name", "10.0.0.7")
    settings = load_settings(state)
    assert settings.ssl_certfile == state / "certs" / "server.crt" and settings.federation == "hospitals"
    gateway = tmp_path / "gateway-key.json"
    gateway.write_text(json.dumps(Gateway().key.__dict__))
    options = ["--targets", "attention", "--rank", "4", "--seed", "7", "--max-steps", "3"]
    made = run("plan", "create", "--dir", state, "--base-model", model, "--gateway-key", gateway, *options, "--json")
    run("plan", "show", "--dir", state, "--out", tmp_path / "plan.json")
    plan = verify_plan(
        Envelope.from_json((tmp_path / "plan.json").read_bytes()), VerifyKey.from_b64(told["public_key"])
    )
    assert plan.plan_id == json.loads(made)["plan_id"]
    assert (plan.rank, plan.alpha, plan.seed, plan.training.max_steps) == (4, 8.0, 7, 3)
    assert plan.base_model_digest == base_model_digest(model) and plan.federation == "hospitals"
    assert len(plan.modules) == 8
    again = json.loads(run("init", "--dir", state, "--json"))
    assert again["public_key"] == told["public_key"], "a second init keeps the key"


def test_options_for_a_coordinator_that_exists_are_refused_with_the_file_to_edit(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state"
    run("init", "--dir", state)
    before = {path: path.read_bytes() for path in state.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit):
        main(["coordinator", "init", "--dir", str(state), "--port", "9000", "--database-url", "sqlite:///x"])
    said = capsys.readouterr().err
    assert "--database-url, --port would change nothing" in said and f"edit {state / 'coordinator.toml'}" in said
    assert {path: path.read_bytes() for path in state.rglob("*") if path.is_file()} == before
    run("init", "--dir", state)


def test_what_an_operator_can_get_wrong_is_one_sentence(run: Run, tmp_path: Path) -> None:
    run("serve", "--dir", tmp_path / "empty", fails="state_dir_missing")
    run("init", "--dir", tmp_path / "state")
    run("serve", "--dir", tmp_path / "state", fails="policy_schema_outdated")
    run("serve", "--dir", tmp_path / "state", "--host", "0.0.0.0", fails="tls_required")
    run("serve", "--dir", tmp_path / "state", "--ssl-certfile", "x.crt", fails="settings_invalid")
    run("plan", "show", "--dir", tmp_path / "state", fails="plan_missing")
    nothing = ("--base-model", tmp_path, "--gateway-key", tmp_path / "no.json")
    run("plan", "create", "--dir", tmp_path / "state", *nothing, fails="gateway_key_invalid")
    run("certs", "--dir", tmp_path / "state")
    run("certs", "--dir", tmp_path / "state", fails="certificate_exists")


@pytest.mark.parametrize(
    "url", ["http://coordinator.example:8443", "HTTP://coordinator.example", "coordinator.example"]
)
def test_an_api_key_is_not_sent_in_the_clear_to_another_machine(url: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("seqr_secret\n")
    with pytest.raises(SettingsInvalid, match="to an https:// address only, or to an http:// one of this"):
        Remote(url, tmp_path / "key", None).call("GET", "/v1/silos")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
def test_an_api_key_is_sent_over_http_within_this_machine(host: str, tmp_path: Path) -> None:
    """Nobody listens on port 80 of the loopback addresses here, so that it was tried is what can be seen."""
    (tmp_path / "key").write_text("seqr_secret\n")
    with pytest.raises(RemoteUnreachable, match=re.escape(f"the coordinator at http://{host} does not answer")):
        Remote(f"http://{host}", tmp_path / "key", None).call("GET", "/v1/silos")


def test_admins_and_officers_work_over_tls(run: Run, served: list[str | Path], world: World, tmp_path: Path) -> None:
    world.add_plan()
    silo = world.silos["clinic"] = Silo("clinic")
    asked = silo.asks()
    body = {**asked.__dict__, "proof": json.loads(asked.proof)}
    url, trust = str(served[1]), ssl.create_default_context(cafile=str(served[5]))
    assert httpx.post(f"{url}/v1/silos/enrolments", json=body, verify=trust, trust_env=False).status_code == 202
    assert silo.key.public.fingerprint in run("silos", *served)
    run("approve", "clinic", "--fingerprint", "SHA256:wrong", *served, fails="fingerprint_mismatch")
    run("approve", "clinic", "--fingerprint", silo.key.public.fingerprint, *served)
    enough = threading.Event()
    worker = threading.Thread(target=work_until, args=(world, enough), daemon=True)
    worker.start()
    assert json.loads(run("job", "clinic", "--wait", "--json", *served))["state"] == "succeeded"
    assert "succeeded" in run("jobs", *served)
    assert "clinic" in run("revisions", "clinic", *served)
    run("job", "bank", *served, fails="silo_unknown")
    filing = ("deletion", "file", "clinic", "--subject", "jane.doe", "--reason", "art. 17", "--json")
    request_id = json.loads(run(*filing, *served))["request_id"]
    deadline = time.monotonic() + 20
    while '"certified"' not in run("deletion", "show", request_id, "--json", *served):
        assert time.monotonic() < deadline
    enough.set()
    worker.join()
    assert "certified" in run("deletion", "show", request_id, *served)
    assert request_id in run("deletion", "list", *served)
    receipt = tmp_path / "receipt.json"
    run("deletion", "receipt", request_id, "--out", receipt, *served)
    assert Envelope.from_json(receipt.read_bytes()).payload
    run("deletion", "receipt", "del-0", *served, fails="deletion_request_unknown")
    run("deletion", "retry", request_id, "--reason", "x", *served, fails="illegal_transition")
    # Nobody works any more: the next job waits, keeps others away, and can be cancelled.
    waiting = json.loads(run("job", "clinic", "--json", *served))["job_id"]
    run("job", "clinic", *served, fails="job_already_live")
    assert "cancelled" in run("cancel", waiting, "--reason", "by mistake", *served)
    run("cancel", waiting, "--reason", "x", *served, fails="illegal_transition")
    assert "duplicate_of" not in run("deletion", "show", request_id, *served)
    run("suspend", "clinic", "--reason", "audit", *served)
    assert world.policy_status("clinic") == "suspended"


def work_until(world: World, enough: threading.Event) -> None:
    while not enough.wait(0.05):
        world.work()
        world.poll()


def test_a_key_or_server_that_cannot_be_trusted_is_named(run: Run, served: list[str | Path], tmp_path: Path) -> None:
    url, key, ca = served[1], served[3], served[5]
    run("silos", "--url", url, "--key-file", tmp_path / "no.key", "--ca-file", ca, fails="settings_invalid")
    run("silos", "--url", url, "--key-file", key, "--ca-file", tmp_path / "no.crt", fails="settings_invalid")
    make_certificates(tmp_path / "other")
    stranger = tmp_path / "other" / "ca.crt"
    run("silos", "--url", url, "--key-file", key, "--ca-file", stranger, fails="coordinator_unreachable")
    run("silos", "--url", "https://127.0.0.1:1", "--key-file", key, "--ca-file", ca, fails="coordinator_unreachable")
    run("silos", "--url", "http://coordinator.example", "--key-file", key, fails="settings_invalid")
    (tmp_path / "bad.key").write_text("seqr_abcdefgh_" + "x" * 43)
    run("silos", "--url", url, "--key-file", tmp_path / "bad.key", "--ca-file", ca, fails="key_unknown")


def test_a_certificate_is_for_the_names_it_was_made_for_and_keys_are_private(tmp_path: Path) -> None:
    make_certificates(tmp_path, ("coordinator", "10.0.0.7"))
    ca = (tmp_path / "ca.crt").read_bytes()
    certificate = x509.load_pem_x509_certificate((tmp_path / "server.crt").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["coordinator"]
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7"]
    assert all((tmp_path / name).stat().st_mode & 0o077 == 0 for name in ("ca.key", "server.key"))
    make_certificates(tmp_path, ("gateway",), "gateway")
    assert (tmp_path / "ca.crt").read_bytes() == ca, "one CA for all"
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(ca))
    with pytest.raises(CertificateExists):
        make_certificates(tmp_path, ("gateway",), "gateway")


def test_plain_http_is_for_loopback_or_behind_a_proxy_only(tmp_path: Path) -> None:
    require_tls(make_settings(directory=tmp_path, host="127.0.0.1"))
    require_tls(make_settings(directory=tmp_path, host="0.0.0.0", allow_plain_http=True))
    with pytest.raises(InsecureListen):
        require_tls(make_settings(directory=tmp_path, host="10.0.0.1"))


def test_the_operators_page_names_every_setting_with_its_default() -> None:
    page = (Path(__file__).parents[2] / "docs" / "operator.md").read_text()
    part = page.partition("## The coordinator's settings\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:3] for line in part.splitlines() if line.startswith("| `")]
    told = {name.strip("` "): cell for names, cell in rows for name in names.split(",")}
    fields = {name: field for name, field in Settings.model_fields.items() if name != "directory"}
    assert set(told) == set(fields)
    for name in ("port", "superlink_port", "deletion_due_days", "silo_grace_seconds", "job_lifetime_days"):
        assert f"{fields[name].default:g}" in told[name].replace(",", "").split(), name
    for name in ("job_attempts", "max_pending_enrolments", "loop_seconds"):
        assert told[name].strip() == str(fields[name].default), name


def test_the_operators_page_says_what_every_state_of_a_deletion_and_of_a_revision_means() -> None:
    page = (Path(__file__).parents[2] / "docs" / "operator.md").read_text()
    part = page.partition("## Deletion requests\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in part.splitlines() if line.startswith("| `")]
    assert sorted(name.strip(" `") for row in rows for name in row.split(",")) == sorted(State)
    line = next(line for line in page.splitlines() if line.startswith("- A revision is `staged`"))
    explained = page[page.index(line) :].partition("\n- ")[0]
    assert {f"`{state}`" for state in RevisionState} <= set(re.findall(r"`\w+`", explained))


def test_help_is_quick_and_loads_no_model(run: Run) -> None:
    import subprocess
    import sys

    code = "import sys, coordinator.cli; sys.exit(bool({'torch', 'sqlalchemy', 'fastapi', 'flwr'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, env=dict(os.environ)).returncode == 0
    assert "deletion" in run("--help")


def test_a_python_package_is_no_place_for_a_coordinators_state(tmp_path: Path) -> None:
    folder = tmp_path / "coordinator"
    folder.mkdir()
    (folder / "__init__.py").touch()
    done = seqr_process("coordinator", "init", "--dir", str(folder), cwd=tmp_path)
    assert done.returncode == 1
    assert "holds a Python package; choose a directory for the coordinator's state" in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["__init__.py"]


def test_a_state_directory_called_coordinator_does_not_hide_the_package(tmp_path: Path) -> None:
    """The documented name, run from its parent: what the launcher starts must import the installed package."""
    made = seqr_process("coordinator", "init", "--dir", "coordinator", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    (tmp_path / "coordinator" / "logs").mkdir()
    code = "from seqr.cli import main; import os; main([]); print(os.environ['PYTHONSAFEPATH'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("1")
    imported = subprocess.run(
        [sys.executable, "-c", "import coordinator.logs as logs; print(logs.__file__)"],
        cwd=tmp_path, env={**os.environ, "PYTHONSAFEPATH": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(imported.stdout.strip()).name == "logs.py"


def seqr_process(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "seqr"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
