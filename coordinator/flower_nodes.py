"""The SuperLink's Control API: which node keys it lets in, and the one resident run.

Flower's node ids are random and live only as long as the SuperLink, whose database is in memory; the coordinator knows
a silo by its keys. So node keys are registered anew whenever a SuperLink starts, and any other node is removed.
"""

import logging
import tomllib
from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
    load_ssh_public_key,
)

from coordinator.errors import CoordinatorError, NodeKeyInvalid
from coordinator.settings import Settings

if TYPE_CHECKING:
    from flwr.proto.node_pb2 import NodeInfo

logger = logging.getLogger(__name__)

CONNECTION = "seqr"
UNREGISTERED = "unregistered"


class SuperLinkUnreachable(CoordinatorError):
    code = "superlink_unreachable"
    status = 503


class NodeKeySpent(CoordinatorError):
    """Flower never takes back a key it has unregistered, until its SuperLink starts anew."""

    code = "node_key_spent"
    status = 409


def canonical_node_key(key: str | bytes) -> str:
    """A node's public key (OpenSSH line or PEM) as an OpenSSH line without comment. Raises NodeKeyInvalid."""
    raw = key.encode() if isinstance(key, str) else key
    try:
        public = load_pem_public_key(raw) if raw.lstrip().startswith(b"-----") else load_ssh_public_key(raw)
    except (ValueError, UnsupportedAlgorithm):
        raise NodeKeyInvalid("the node key is no public key in OpenSSH or PEM form") from None
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise NodeKeyInvalid("the node key must be an elliptic-curve key (P-384), as `seqr silo init` makes it")
    return public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


class FlowerNodes:
    """Registers and unregisters node keys, and starts the resident run, at the SuperLink of this coordinator.

    The SuperLink's address is read from ``<directory>/flower/home/config.toml`` at every use: the launcher writes it.
    """

    def __init__(self, settings: Settings) -> None:
        self._home = settings.directory / "flower" / "home"

    def register(self, silo_id: str, node_key: str) -> None:
        """Let the holder of ``node_key`` connect; does nothing when it already may.

        Raises NodeKeyInvalid, NodeKeySpent, SuperLinkUnreachable.
        """
        key = canonical_node_key(node_key)
        with self._control() as control:
            control.add(silo_id, key, control.nodes_by_key().get(key))

    def unregister(self, node_key: str) -> None:
        """Cut the holder of ``node_key`` off at once; does nothing when it is not connected."""
        with self._control() as control:
            node = control.nodes_by_key().get(canonical_node_key(node_key))
            if node is not None:
                control.remove(node)

    def sync(self, wanted: Callable[[], Mapping[str, str]]) -> list[str]:
        """Make exactly ``wanted()`` (node key -> silo id) the registered keys.

        Returns the ids of silos whose key this SuperLink no longer takes. Raises SuperLinkUnreachable.
        """
        spent = []
        with self._control() as control:
            present = control.nodes_by_key()
            # Asked after the SuperLink: a silo approved and registered in between would else be taken for a stranger,
            # and Flower never takes an unregistered key back.
            keys = {canonical_node_key(key): silo_id for key, silo_id in wanted().items()}
            for key, node in present.items():
                if key not in keys:
                    control.remove(node)
            for key, silo_id in keys.items():
                try:
                    control.add(silo_id, key, present.get(key))
                except NodeKeySpent:
                    spent.append(silo_id)
        return spent

    def start_run(self, app: bytes) -> int:
        """Submit ``app`` as a new run and return its id. Raises SuperLinkUnreachable."""
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.proto.fab_pb2 import Fab

        request = StartRunRequest(fab=Fab(hash_str=sha256(app).hexdigest(), content=app))
        with self._control() as control:
            response = control.call("StartRun", request)
        if not response.HasField("run_id"):
            raise SuperLinkUnreachable("the SuperLink did not accept the resident run")
        return int(response.run_id)

    def unfinished_runs(self) -> list[int]:
        """The ids of all runs that have not finished. Raises SuperLinkUnreachable."""
        from flwr.proto.control_pb2 import ListRunsRequest

        with self._control() as control:
            runs = control.call("ListRuns", ListRunsRequest()).run_dict
        return [int(run_id) for run_id, run in runs.items() if run.status.status != "finished"]

    def stop_runs(self, run_ids: Iterable[int]) -> None:
        """Stop runs; their ServerApps end by themselves. Raises SuperLinkUnreachable."""
        from flwr.proto.control_pb2 import StopRunRequest

        with self._control() as control:
            for run_id in run_ids:
                control.call("StopRun", StopRunRequest(run_id=run_id))

    def _control(self) -> "_Control":
        try:
            connection = tomllib.loads((self._home / "config.toml").read_text())["superlink"][CONNECTION]
        except FileNotFoundError:
            raise SuperLinkUnreachable("no SuperLink has been started yet: run `seqr coordinator flower`") from None
        return _Control(connection["address"], Path(connection["root-certificates"]))


class _Control:
    """One connection to the Control API whose failures are SuperLinkUnreachable."""

    def __init__(self, address: str, ca_file: Path) -> None:
        from flwr.supercore.control import ControlHttpClient
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

        try:
            self._client: ControlHttpClient = ControlHttpClient.from_server_address(
                address,
                False,
                ca_file.read_bytes(),
                interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
            )
        except OSError as error:
            raise SuperLinkUnreachable(f"the SuperLink's CA certificate cannot be read: {error.strerror}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._client.close()

    def call(self, name: str, request: Any) -> Any:
        try:
            return getattr(self._client, name)(request)
        except httpx.HTTPStatusError as error:
            raise SuperLinkUnreachable(f"the SuperLink refused {name} with HTTP {error.response.status_code}") from None
        except (httpx.HTTPError, OSError):
            raise SuperLinkUnreachable(
                f"the SuperLink did not answer {name}; is `seqr coordinator flower` up?"
            ) from None

    def nodes_by_key(self) -> "dict[str, NodeInfo]":
        from flwr.proto.control_pb2 import ListNodesRequest

        nodes = self.call("ListNodes", ListNodesRequest()).nodes_info
        return {canonical_node_key(node.public_key): node for node in nodes}

    def add(self, silo_id: str, key: str, known: "NodeInfo | None") -> None:
        from flwr.proto.control_pb2 import RegisterNodeRequest

        if known is None:
            self.call("RegisterNode", RegisterNodeRequest(public_key=_pem(key), name=silo_id))
            logger.info("node key of silo %s registered", silo_id)
        elif known.status == UNREGISTERED:
            raise NodeKeySpent(
                f"silo '{silo_id}' was disconnected from this SuperLink, which does not take the same node key twice: "
                "restart `seqr coordinator flower`"
            )

    def remove(self, node: "NodeInfo") -> None:
        from flwr.proto.control_pb2 import UnregisterNodeRequest

        if node.status != UNREGISTERED:
            self.call("UnregisterNode", UnregisterNodeRequest(node_id=node.node_id))
            logger.info("node %s unregistered", node.name or node.node_id)


def _pem(openssh: str) -> bytes:
    return load_ssh_public_key(openssh.encode()).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
