"""docker-compose.yml holds what it promises, and names nothing that the code does not have.

No container engine is needed: the file is read, and every command, flag and variable in it is looked up in the code.
"""

import argparse
import importlib
import os
import re
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click
import pytest
import typer.main
import yaml

from coordinator.fleet_proxy import BODY_LIMIT_BYTES, FLEET_PATH
from seqr.supervisor import free_port

ROOT = Path(__file__).parents[1]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
NGINX = (ROOT / "docker" / "nginx.conf").read_text()
WANTED = {
    "postgres",
    "superlink",
    "superexec",
    "flower",
    "coordinator",
    "nginx",
    "gateway",
    "silo-a",
    "silo-b",
}
FLOWER = {"superlink", "superexec", "flower", "silo-a", "silo-b"}
# Variables that other people's images and libraries define, with the place that says so.
FOREIGN = {
    "POSTGRES_USER": "postgres image",
    "POSTGRES_DB": "postgres image",
    "POSTGRES_PASSWORD_FILE": "postgres image",
    "POSTGRES_INITDB_ARGS": "postgres image",
    "PGSERVICEFILE": "libpq",
    "HF_HUB_OFFLINE": "huggingface_hub",
}

each_service = pytest.mark.parametrize("name", sorted(SERVICES))


def command_of(name: str) -> list[str]:
    return [str(part) for part in SERVICES[name].get("command", [])]


def health_command_of(name: str) -> list[str]:
    return [str(part) for part in SERVICES[name]["healthcheck"]["test"]][1:]


def test_the_services_of_one_federation_are_there() -> None:
    assert set(SERVICES) == WANTED


@each_service
def test_every_service_is_hardened(name: str) -> None:
    service = SERVICES[name]
    uid = int(str(service["user"]).split(":")[0])
    assert uid > 0, "not root"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"] and "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["tmpfs"], "a read-only root needs somewhere to write that is gone afterwards"
    assert not {"privileged", "network_mode", "pid", "ipc", "devices"} & set(service)
    assert not any("docker.sock" in str(volume) for volume in service.get("volumes", []))


@each_service
def test_every_service_has_a_health_check(name: str) -> None:
    check = SERVICES[name]["healthcheck"]
    assert check["test"][0] == "CMD" and {"interval", "timeout", "retries"} <= set(check)


def test_secrets_are_files_whose_folder_must_be_named() -> None:
    for name, secret in COMPOSE["secrets"].items():
        assert re.fullmatch(rf"\$\{{SEQR_SECRETS:\?[^}}]+\}}/{name}", secret["file"])
    used = {secret for service in SERVICES.values() for secret in service.get("secrets", [])}
    assert used == set(COMPOSE["secrets"])


def test_no_password_stands_in_the_file() -> None:
    for service in SERVICES.values():
        for variable, value in (service.get("environment") or {}).items():
            assert not re.search(r"PASSWORD|SECRET|TOKEN(?!_DIR)", variable) or variable.endswith("_FILE")
            # A URL with user:password@ in it.
            assert not re.search(r"://[^/\s]*:[^/\s]*@", str(value))
    assert not re.search(r"\$\{[A-Z_]*(PASSWORD|SECRET)[A-Z_]*:?-", (ROOT / "docker-compose.yml").read_text())


def test_silos_share_a_network_with_nginx_alone() -> None:
    on_silos = {name for name, service in SERVICES.items() if "silos" in service["networks"]}
    assert on_silos == {"nginx", "silo-a", "silo-b"}
    for name in ("silo-a", "silo-b"):
        assert SERVICES[name]["networks"] == ["silos"] and "ports" not in SERVICES[name]


def test_the_superlink_and_the_database_are_published_nowhere() -> None:
    for name in ("superlink", "superexec", "flower", "postgres"):
        assert "ports" not in SERVICES[name]
        assert all(COMPOSE["networks"][network]["internal"] for network in SERVICES[name]["networks"])
    for name in ("coordinator", "gateway"):
        assert all(port.startswith("127.0.0.1:") for port in SERVICES[name]["ports"])


def test_the_superlink_keeps_nothing_on_disk() -> None:
    superlink = SERVICES["superlink"]
    assert "volumes" not in superlink
    assert not any(part.startswith(("--database", "--log-file")) for part in command_of("superlink"))
    assert superlink["environment"]["FLWR_HOME"].startswith("/run/flower")
    assert any(mount.startswith("/run/flower:") for mount in superlink["tmpfs"])


def test_the_superlink_authenticates_nodes_and_executors() -> None:
    command = command_of("superlink")
    assert "--enable-supernode-auth" in command and "--isolation=process" in command
    assert "--disable-runtime-dependency-installation" in command and "--insecure" not in command
    secret = "--superexec-auth-secret-file=/run/secrets/superexec_secret"
    assert secret in command and secret in command_of("superexec")


@pytest.mark.parametrize("name", sorted(FLOWER | {"coordinator", "gateway"}))
def test_nothing_phones_home(name: str) -> None:
    environment = SERVICES[name]["environment"]
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert environment["HF_HUB_OFFLINE"] == "1"


# Commands and flags


def seqr_options(arguments: list[str]) -> tuple[list[str], dict[str, click.Parameter]]:
    """What is left of ``arguments`` after the subcommands, and the options of the command they name."""
    group, *rest = arguments
    (point,) = [p for p in entry_points(group="seqr.commands") if p.name == group]
    command: click.Command = typer.main.get_command(point.load())
    while isinstance(command, click.Group):
        assert rest[0] in command.commands, f"`seqr {group}` has no command {rest[0]}"
        command, rest = command.commands[rest[0]], rest[1:]
    return rest, {option: parameter for parameter in command.params for option in parameter.opts}


def flower_parser(name: str) -> argparse.ArgumentParser:
    if name == "superlink":
        module, function = "flwr.superlink.cli.flower_superlink", "_parse_args_run_superlink"
    else:
        module, function = "flwr.supercore.cli.flower_superexec", "_parse_args"
    parser: argparse.ArgumentParser = getattr(importlib.import_module(module), function)()
    return parser


def every_command() -> Iterator[tuple[str, list[str]]]:
    for name, service in SERVICES.items():
        if service.get("image") == "seqr:0.1.0":
            yield name, command_of(name)
            yield name, health_command_of(name)


@pytest.mark.parametrize(("name", "command"), list(every_command()))
def test_every_command_and_flag_exists_in_the_code(name: str, command: list[str]) -> None:
    if command[0] == "seqr":
        rest, options = seqr_options(command[1:])
        for part in rest:
            assert part.split("=")[0] in options, f"{name}: {part}"
    elif command[0] == "flower-superlink":
        flower_parser("superlink").parse_args(command[1:])
    elif command[:3] == ["python", "-m", "coordinator.flower_process"]:
        assert command[3] == "superexec"
        flower_parser("superexec").parse_args(command[4:])
    else:
        assert command[:2] == ["python", "-c"]
        compile(command[2], name, "exec")


def known_variables() -> set[str]:
    """Every SEQR_ variable some settings class, command line or process reads."""
    from coordinator.settings import Settings as CoordinatorSettings
    from inference_gateway.settings import Settings as GatewaySettings
    from silo_client.config import SiloConfig

    known = set()
    for settings in (CoordinatorSettings, GatewaySettings, SiloConfig):
        known |= {settings.model_config["env_prefix"] + field.upper() for field in settings.model_fields}
    for point in entry_points(group="seqr.commands"):
        known |= variables_of(typer.main.get_command(point.load()))
    from coordinator.flower_process import TOKEN_DIRECTORY

    return known | {TOKEN_DIRECTORY}


def variables_of(command: click.Command) -> set[str]:
    if isinstance(command, click.Group):
        return set().union(*(variables_of(sub) for sub in command.commands.values()))
    found: set[str] = set()
    for parameter in command.params:
        found |= {parameter.envvar} if isinstance(parameter.envvar, str) else set(parameter.envvar or ())
    return found


def test_every_environment_variable_exists_in_the_code() -> None:
    import flwr

    flower = Path(flwr.__file__).parent
    sources = [flower / "common" / "constant.py", flower / "supercore" / "logger.py"]
    sources += [flower / "supercore" / "telemetry.py", flower / "supercore" / "constant.py"]
    flower_text = "".join(path.read_text() for path in sources)
    known = known_variables()
    for name, service in SERVICES.items():
        for variable in service.get("environment") or {}:
            if variable.startswith("SEQR_"):
                assert variable in known, f"{name}: {variable}"
            elif variable.startswith("FLWR_"):
                assert f'"{variable}"' in flower_text, f"{name}: {variable}"
            else:
                assert variable in FOREIGN, f"{name}: {variable}"


def test_settings_given_by_compose_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    from coordinator.settings import load_settings
    from inference_gateway.settings import load_settings as load_gateway_settings

    for variable, value in SERVICES["coordinator"]["environment"].items():
        monkeypatch.setenv(variable, value)
    coordinator = load_settings("/var/lib/seqr/coordinator")
    assert coordinator.superlink_address == "superlink:8000"
    assert coordinator.database_url != coordinator.policy_database_url
    for variable, value in SERVICES["gateway"]["environment"].items():
        monkeypatch.setenv(variable, str(value))
    assert load_gateway_settings("/var/lib/seqr/gateway").port == 8080


def test_database_urls_take_host_and_password_from_the_service_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqlalchemy.exc import OperationalError

    from coordinator.db import open_engine
    from policy.db import create_engine_for

    port = free_port()
    (tmp_path / "pg_service").write_text(f"[seqr]\nhost=127.0.0.1\nport={port}\nuser=seqr\npassword=x\n")
    # As readable as the secrets of compose are: libpq ignores a password file (PGPASSFILE) that others may read.
    (tmp_path / "pg_service").chmod(0o444)
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "pg_service"))
    environment = SERVICES["coordinator"]["environment"]
    for engine in (
        open_engine(environment["SEQR_COORDINATOR_DATABASE_URL"]),
        create_engine_for(environment["SEQR_COORDINATOR_POLICY_DATABASE_URL"]),
    ):
        with pytest.raises(OperationalError, match=f"port {port} failed"):
            engine.connect()
        engine.dispose()


# nginx


def test_nginx_and_the_fleet_proxy_have_the_same_rule() -> None:
    rules = re.findall(r'"\^(/v1/fleet/[^"]+)\$"', NGINX)
    assert rules == [FLEET_PATH.pattern.decode()] * 2
    assert f"client_max_body_size {BODY_LIMIT_BYTES // 1024 // 1024}m;" in NGINX


def test_nginx_proxies_fleet_calls_and_enrolment_and_nothing_else() -> None:
    places = re.findall(r"location\s+([^{]+?)\s*\{\s*(?!\s*return)", NGINX)
    assert [place for place in places if not re.search(re.escape(place) + r"\s*\{\s*return", NGINX)] == [
        '~ "^/v1/fleet/[a-z]+(-[a-z]+)*$"',
        "= /v1/silos/enrolments",
    ]
    assert "location / { return 404; }" in NGINX and "proxy_ssl_verify on;" in NGINX


# What needs a tool that may be missing


@pytest.fixture
def secrets_folder(tmp_path: Path) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path / "secrets"
    make = [str(ROOT / "docker" / "make-secrets.sh"), str(folder), "203.0.113.7", "federation.example.org"]
    subprocess.run(["sh", *make], check=True, capture_output=True)
    return folder


def test_made_secrets_are_private_and_their_certificate_is_good(secrets_folder: Path) -> None:
    assert secrets_folder.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in secrets_folder.iterdir()} == set(COMPOSE["secrets"]) | {"ca.key"}
    password = (secrets_folder / "postgres_password").read_text()
    assert len(password) == 64 and f"password={password}" in (secrets_folder / "pg_service").read_text()
    assert len((secrets_folder / "superexec_secret").read_bytes()) == 48
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(secrets_folder / "tls_certificate", secrets_folder / "tls_key")
    for name in (
        "superlink",
        "coordinator",
        "nginx",
        "localhost",
        "127.0.0.1",
        "203.0.113.7",
        "federation.example.org",
    ):
        shake_hands(server, secrets_folder / "ca_certificate", name)


def shake_hands(server: ssl.SSLContext, ca: Path, name: str) -> None:
    client = ssl.create_default_context(cafile=str(ca))
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for side in sides:
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert sides[0].getpeercert()


def test_a_renewed_certificate_is_of_the_same_ca_and_no_other_secret_changes(secrets_folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in secrets_folder.iterdir()}
    renew = ["sh", str(ROOT / "docker" / "make-secrets.sh"), "--renew", str(secrets_folder), "new.example.org"]
    subprocess.run(renew, check=True, capture_output=True)
    after = {path.name: path.read_bytes() for path in secrets_folder.iterdir()}
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {"tls_key", "tls_certificate"}
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(secrets_folder / "tls_certificate", secrets_folder / "tls_key")
    for name in ("superlink", "new.example.org"):
        shake_hands(server, secrets_folder / "ca_certificate", name)
    (secrets_folder / "ca.key").unlink()
    refused = subprocess.run(renew, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "holds no ca.key; bring it back, it signs the new certificate" in refused.stderr
    assert (secrets_folder / "tls_key").read_bytes() == after["tls_key"]


def test_secrets_are_never_overwritten(secrets_folder: Path) -> None:
    before = (secrets_folder / "postgres_password").read_text()
    again = subprocess.run(
        ["sh", str(ROOT / "docker" / "make-secrets.sh"), str(secrets_folder)], capture_output=True, check=False
    )
    assert again.returncode != 0 and (secrets_folder / "postgres_password").read_text() == before


def compose_config(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """``docker compose config``, or its predecessor's, which reads the same file."""
    plugin = shutil.which("docker") and subprocess.run(
        ["docker", "compose", "version"], capture_output=True, check=False
    )
    if plugin and plugin.returncode == 0:
        program = ["docker", "compose"]
    elif shutil.which("docker-compose"):
        program = ["docker-compose"]
    else:
        pytest.skip("neither the compose plugin of docker nor docker-compose is installed")
    command = [*program, "--file", str(ROOT / "docker-compose.yml"), "config", "--quiet"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SEQR_")}
    return subprocess.run(command, env={**inherited, **environment}, capture_output=True, text=True, check=False)


def test_docker_compose_accepts_the_file(tmp_path: Path) -> None:
    needed = {name: str(tmp_path) for name in ("SEQR_SECRETS", "SEQR_BASE_MODEL", "SEQR_SILO_A", "SEQR_SILO_B")}
    done = compose_config(needed)
    assert done.returncode == 0, done.stderr


def test_docker_compose_refuses_to_go_on_without_secrets(tmp_path: Path) -> None:
    needed = {name: str(tmp_path) for name in ("SEQR_BASE_MODEL", "SEQR_SILO_A", "SEQR_SILO_B")}
    done = compose_config(needed)
    assert done.returncode != 0 and "make-secrets.sh" in done.stderr
