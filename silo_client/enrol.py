"""Asking the coordinator to let this silo in: public keys, signed by the key they name. No record is involved."""

import ssl
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from seqr.enrolment import EnrolmentClaim, sign_enrolment
from seqr.files import write_private
from silo_client.config import SiloConfig
from silo_client.errors import ConfigInvalid, CoordinatorUnreachable, EnrolmentRefused
from silo_client.state import State

TIMEOUT_S = 30.0


def create_node_key(state: State) -> None:
    """Flower's key of this node (EC P-384, OpenSSH form) and its public half beside it; an existing one is kept."""
    if state.node_key_path.exists():
        return
    key = ec.generate_private_key(ec.SECP384R1())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    write_private(state.node_key_path.with_suffix(".key.pub"), public + b"\n")
    write_private(state.node_key_path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))


def request_body(config: SiloConfig, state: State) -> dict[str, Any]:
    """The enrolment request: exactly what is sent."""
    key = state.signing_key()
    node_key = state.node_key_path.with_suffix(".key.pub").read_text().strip()
    claim = EnrolmentClaim(config.silo_id, config.display_name, key.public.to_b64(), node_key)
    return {**asdict(claim), "proof": sign_enrolment(claim, key).to_dict()}


def enrol(config: SiloConfig, state: State) -> str:
    """Send the request; returns the fingerprint that the owner reads out to the admin.

    Raises:
        ConfigInvalid: silo.toml has no coordinator URL, or a CA file that cannot be read.
        CoordinatorUnreachable: no answer.
        EnrolmentRefused: the coordinator said no, with its reason.
    """
    response = _call(config, "POST", "/v1/silos/enrolments", json=request_body(config, state))
    if response.status_code != 202:
        raise EnrolmentRefused(f"the coordinator refused the enrolment: {_reason(response)}")
    return state.signing_key().public.fingerprint


def reach(config: SiloConfig) -> None:
    """Raise CoordinatorUnreachable unless the coordinator, or a proxy before it, answers that it is well."""
    response = _call(config, "GET", "/healthz")
    if not response.is_success:
        raise CoordinatorUnreachable(
            f"{config.coordinator.url} answers with status {response.status_code}, expected 200 or another 2xx"
        )


def _call(config: SiloConfig, method: str, path: str, json: Any = None) -> httpx.Response:
    if not config.coordinator.url:
        raise ConfigInvalid("'coordinator.url' is not set in silo.toml")
    url = config.coordinator.url.rstrip("/") + path
    try:
        with httpx.Client(
            verify=_tls(config.coordinator.ca_file and config.resolve(config.coordinator.ca_file))
        ) as client:
            return client.request(method, url, json=json, timeout=TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise CoordinatorUnreachable(
            f"the coordinator at {config.coordinator.url} cannot be reached: {error}; see url and ca_file in silo.toml"
        ) from None


def _tls(ca_file: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))
    except (OSError, ssl.SSLError):
        raise ConfigInvalid(f"the CA file {ca_file} cannot be read as certificates; see ca_file in silo.toml") from None


def _reason(response: httpx.Response) -> str:
    try:
        problem = response.json()
        return str(problem["detail"])
    except (ValueError, KeyError, TypeError):
        return f"status {response.status_code}"
