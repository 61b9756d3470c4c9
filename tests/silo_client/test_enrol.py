"""Enrolment: public keys and nothing else, signed by the key they name."""

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from seqr.dsse import Envelope
from seqr.enrolment import verify_enrolment
from seqr.keys import VerifyKey
from silo_client.enrol import enrol, reach
from silo_client.errors import ConfigInvalid, CoordinatorUnreachable, EnrolmentRefused

from .conftest import Silo


class Coordinator(HTTPServer):
    """Answers every request with ``answer`` and keeps what it was sent."""

    answer: tuple[int, dict[str, Any] | None] = (202, {})
    received: dict[str, Any] = {}


class Handler(BaseHTTPRequestHandler):
    server: Coordinator

    def do_POST(self) -> None:
        self.server.received = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.do_GET()

    def do_GET(self) -> None:
        status, body = self.server.answer
        self.send_response(status)
        self.end_headers()
        if body is not None:
            self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_args: object) -> None:
        pass


@pytest.fixture
def coordinator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Coordinator]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Coordinator(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def silo(make_silo: Callable[..., Silo], coordinator: Coordinator) -> Silo:
    made = make_silo()
    settings = made.config.coordinator.model_copy(update={"url": f"http://127.0.0.1:{coordinator.server_port}/"})
    made.config = made.config.model_copy(update={"coordinator": settings})
    return made


def test_the_request_holds_public_keys_and_a_proof_by_the_signing_key(silo: Silo, coordinator: Coordinator) -> None:
    fingerprint = enrol(silo.config, silo.state)
    body = coordinator.received
    assert set(body) == {"silo_id", "display_name", "signing_key", "node_key", "proof"}
    key = VerifyKey.from_b64(body["signing_key"])
    proven = verify_enrolment(Envelope.from_dict(body.pop("proof")), key)
    assert asdict(proven) == body
    assert fingerprint == key.fingerprint == silo.state.signing_key().public.fingerprint
    node = load_ssh_public_key(body["node_key"].encode())
    assert isinstance(node, EllipticCurvePublicKey)
    assert isinstance(node.curve, SECP384R1)


def test_a_refusal_gives_the_coordinators_reason(silo: Silo, coordinator: Coordinator) -> None:
    coordinator.answer = (409, {"detail": "silo silo-a is enrolled already", "code": "silo_already_enrolled"})
    with pytest.raises(EnrolmentRefused, match="silo silo-a is enrolled already"):
        enrol(silo.config, silo.state)


def test_a_coordinator_that_is_not_there_is_named(silo: Silo, coordinator: Coordinator) -> None:
    settings = silo.config.coordinator.model_copy(update={"url": "http://127.0.0.1:1"})
    with pytest.raises(CoordinatorUnreachable, match=r"http://127\.0\.0\.1:1 cannot be reached"):
        enrol(silo.config.model_copy(update={"coordinator": settings}), silo.state)


def test_reach_asks_for_health(silo: Silo, coordinator: Coordinator) -> None:
    coordinator.answer = (200, {})
    reach(silo.config)
    for status in (302, 404, 503):
        coordinator.answer = (status, {})
        with pytest.raises(CoordinatorUnreachable, match=f"status {status}, expected 200 or another 2xx"):
            reach(silo.config)


def test_a_proxy_that_is_well_without_a_body_is_reached(silo: Silo, coordinator: Coordinator) -> None:
    """nginx, as docker/nginx.conf sets it up, answers /healthz itself, with 204."""
    coordinator.answer = (204, None)
    reach(silo.config)


def test_settings_without_a_url_or_with_a_broken_ca_file_are_named(make_silo: Callable[..., Silo]) -> None:
    silo = make_silo()
    with pytest.raises(ConfigInvalid, match=r"'coordinator\.url' is not set"):
        enrol(silo.config, silo.state)
    (silo.directory / "ca.crt").write_text("no certificate")
    settings = silo.config.coordinator.model_copy(update={"url": "https://x", "ca_file": silo.directory / "ca.crt"})
    with pytest.raises(ConfigInvalid, match="cannot be read as certificates"):
        enrol(silo.config.model_copy(update={"coordinator": settings}), silo.state)
