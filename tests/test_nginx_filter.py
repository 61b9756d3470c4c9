"""The nginx of docker-compose.yml, really run: silos reach fleet calls and the enrolment form, and nothing else."""

import contextlib
import http.client
import os
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from seqr.supervisor import accepts_connections, free_port

ROOT = Path(__file__).parents[1]
NGINX = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")

pytestmark = pytest.mark.skipif(NGINX is None or shutil.which("openssl") is None, reason="nginx or openssl is missing")

PASSED = ["/v1/fleet/pull-messages", "/v1/fleet/push-object", "/v1/fleet/get-run", "/v1/silos/enrolments"]
REFUSED = [
    "/v1/control/list-runs",
    "/v1/control/start-run",
    "/v1/runtime/acquire-task",
    "/v1/fleet",
    "/v1/fleet/",
    "/v1/fleet//pull-messages",
    "//v1/fleet/pull-messages",
    "/v1/fleet/../control/start-run",
    "/v1/fleet/%2e%2e/control/start-run",
    "/v1/fleet/pull%2dmessages",
    "/v1/fleet/pull-messages?x=1",
    "/v1/fleet/pull-messages/../../control/start-run",
    "/v1/control/../fleet/pull-messages",
    "/V1/FLEET/PULL-MESSAGES",
    "/v1/silos",
    "/v1/silos/alpha/approve",
    "/v1/silos/enrolments?x=1",
    "/v1/silos/enrolments/../alpha/approve",
    "/docs",
    "/",
]


@dataclass
class Door:
    """nginx before a server that answers everything, and what that server was asked."""

    port: int
    context: ssl.SSLContext
    asked: list[tuple[str, str]]

    def call(self, path: str, method: str = "POST", body: bytes = b"x") -> int:
        connection = http.client.HTTPSConnection("localhost", self.port, context=self.context, timeout=10)
        connection.putrequest(method, path, skip_host=False)
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.send(body)
        status = connection.getresponse().status
        connection.close()
        return status


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    folder = tmp_path_factory.mktemp("nginx")
    secrets = folder / "secrets"
    subprocess.run(["sh", str(ROOT / "docker" / "make-secrets.sh"), str(secrets)], check=True, capture_output=True)
    asked: list[tuple[str, str]] = []

    class Upstream(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            asked.append((self.command, self.path))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        do_GET = do_PUT = do_DELETE = do_POST

        def log_message(self, *_: object) -> None:
            return

    upstream = ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(secrets / "tls_certificate", secrets / "tls_key")
    upstream.socket = server.wrap_socket(upstream.socket, server_side=True)
    threading.Thread(target=upstream.serve_forever, daemon=True).start()

    port = free_port()
    text = (ROOT / "docker" / "nginx.conf").read_text()
    behind = f"127.0.0.1:{upstream.server_address[1]}"
    for old, new in {
        "/tmp/": f"{folder}/",
        "listen 8444 ssl": f"listen 127.0.0.1:{port} ssl",
        "superlink:8000": behind,
        "coordinator:8443": behind,
        "/run/secrets": str(secrets),
        "resolver 127.0.0.11 valid=10s ipv6=off;": "",
        # The test asks faster than a silo's owner.
        "rate=10r/m": "rate=1000r/s",
    }.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "nginx.conf").write_text(text + "\ndaemon off;\n")
    nginx = subprocess.Popen([str(NGINX), "-c", str(folder / "nginx.conf"), "-p", str(folder)], start_new_session=True)
    try:
        deadline = time.monotonic() + 10
        while not accepts_connections("127.0.0.1", port):
            assert nginx.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        yield Door(port, ssl.create_default_context(cafile=str(secrets / "ca_certificate")), asked)
    finally:
        nginx.terminate()
        nginx.wait(10)
        upstream.shutdown()


@pytest.mark.parametrize("path", PASSED)
def test_fleet_calls_and_enrolment_pass_unchanged(door: Door, path: str) -> None:
    door.asked.clear()
    assert door.call(path) == 200 and door.asked == [("POST", path)]


@pytest.mark.parametrize("path", REFUSED)
def test_everything_else_is_not_found(door: Door, path: str) -> None:
    door.asked.clear()
    assert (door.call(path), door.asked) == (404, [])


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS"])
@pytest.mark.parametrize("path", PASSED)
def test_other_methods_are_not_found(door: Door, path: str, method: str) -> None:
    door.asked.clear()
    assert (door.call(path, method), door.asked) == (404, [])


def test_a_chunk_of_five_mebibytes_passes_and_an_overlong_body_does_not(door: Door) -> None:
    assert door.call("/v1/fleet/push-object", body=bytes(5 * 1024 * 1024 + 1000)) == 200
    door.asked.clear()
    assert (door.call("/v1/fleet/push-object", body=bytes(17 * 1024 * 1024)), door.asked) == (413, [])
    assert door.call("/v1/silos/enrolments", body=bytes(65 * 1024)) == 413
