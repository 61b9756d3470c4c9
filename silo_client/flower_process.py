"""Flower's own processes, as a silo runs them: ``python -m silo_client.flower_process supernode|superexec ...``.

Three things are changed before Flower's entry point is called, and nothing else:

- the SuperNode takes the app from :mod:`silo_client.thin_app` and never asks the SuperLink for one, so code that a
  coordinator sends does not even arrive (docs/decisions/0002);
- a SuperNode whose predecessor was killed says goodbye in its name, and so need not wait a minute to be let in;
- the SuperExec starts nothing but this silo's ClientApp and hands it its task token in a file, not in ``argv``.

They replace methods of Flower's classes, so any version but the one they were written for is refused.
"""

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqr.files import write_private
from seqr.supervisor import follow_supervisor
from silo_client.errors import SiloError

if TYPE_CHECKING:
    from flwr.supercore.superexec.executor.types import ExecutionSpec, LaunchResult

FLOWER_VERSION = "1.41.0"
TOKEN_DIRECTORY = "SEQR_FLOWER_TOKEN_DIR"
NODE_FILE = "SEQR_FLOWER_NODE_FILE"

logger = logging.getLogger("flwr")


class FlowerVersionUnsupported(SiloError):
    """The installed Flower is not the one whose code path was closed."""

    code = "flower_version_unsupported"


def refuse_other_versions() -> None:
    """Raises FlowerVersionUnsupported unless exactly the Flower this module was written for is installed."""
    from flwr.supercore.version import package_version

    if package_version != FLOWER_VERSION:
        raise FlowerVersionUnsupported(
            f"flwr {package_version} is installed, but this silo client runs only with flwr {FLOWER_VERSION}, "
            f"for which it is known that a coordinator's code cannot be run here: pip install flwr=={FLOWER_VERSION}"
        )


def use_own_app() -> None:
    """Make the SuperNode run this silo's own app for every run, and ignore what the run says about its app."""
    from flwr.proto.fab_pb2 import Fab, GetFabRequest, GetFabResponse
    from flwr.proto.run_pb2 import GetRunRequest, GetRunResponse
    from flwr.supercore.constant import TaskType
    from flwr.supernode.fleet_http_client import FleetHttpClient

    from silo_client.thin_app import build_thin_app

    own = build_thin_app()
    ask_for_run = FleetHttpClient.GetRun

    def get_run(client: Any, request: GetRunRequest) -> GetRunResponse:
        response: GetRunResponse = ask_for_run(client, request)
        if response.run.fab_hash != own.digest:
            logger.warning("the coordinator's app has another digest than this silo's own, which runs instead")
        response.run.fab_id = own.fab_id
        response.run.fab_version = own.version
        response.run.fab_hash = own.digest
        response.run.override_config.clear()
        # An AgentApp run would make the SuperNode start another program than the ClientApp.
        response.run.primary_task_type = TaskType.SERVER_APP
        return response

    def get_fab(_client: Any, _request: GetFabRequest) -> GetFabResponse:
        return GetFabResponse(fab=Fab(hash_str=own.digest, content=own.content))

    FleetHttpClient.GetRun = get_run
    FleetHttpClient.GetFab = get_fab


def take_over_from_predecessor() -> None:
    """Make the SuperNode end the connection of a predecessor that could not do so itself, before it opens its own.

    The SuperLink holds a killed node for connected until two heartbeats of 30 s are missed, and lets no other in with
    its key. Only one SuperNode of a silo runs at a time (``silo_client.node``), so the one remembered here is dead.
    """
    import httpx
    from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse, DeactivateNodeRequest
    from flwr.supernode.fleet_http_client import FleetHttpClient

    remembered = Path(os.environ[NODE_FILE])
    activate = FleetHttpClient.ActivateNode

    def activate_node(client: Any, request: ActivateNodeRequest) -> ActivateNodeResponse:
        if remembered.exists() and remembered.read_text().isdecimal():
            try:
                client.DeactivateNode(DeactivateNodeRequest(node_id=int(remembered.read_text())))
            except httpx.HTTPStatusError:
                # Said goodbye in time, or the SuperLink is a new one that never knew it.
                logger.debug("no earlier connection had to be ended")
        response: ActivateNodeResponse = activate(client, request)
        remembered.write_text(str(response.node_id))
        return response

    FleetHttpClient.ActivateNode = activate_node


def launch_client_app_only() -> None:
    """Make the SuperExec start this silo's ClientApp and refuse every other kind of task."""
    from flwr.supercore.constant import TaskType
    from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor
    from flwr.supercore.superexec.executor.types import LaunchResult

    from silo_client.thin_app import build_thin_app

    own = build_thin_app()
    tokens = Path(os.environ[TOKEN_DIRECTORY])

    def launch(_executor: Any, spec: "ExecutionSpec") -> "LaunchResult":
        if spec.task_type is not TaskType.CLIENT_APP or spec.fab_hash != own.digest:
            return LaunchResult.failed("this silo runs its own ClientApp and nothing else")
        # One task at a time: the file of the task before this one has long been read.
        token = tokens / "task.token"
        write_private(token, spec.token.encode())
        command = [sys.executable, "-m", "silo_client.flower_process", "clientapp"]
        command += ["--runtime-api-address", spec.runtime_api_address, "--insecure"]
        command += ["--token-file", str(token), "--parent-pid", str(os.getpid())]
        subprocess.Popen(command)
        return LaunchResult.accepted()

    SubprocessExecutor.launch = launch


def main() -> None:
    """Run one of Flower's processes with the arguments that follow its name."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    sys.argv = [f"flower-{name}", *sys.argv[2:]]
    refuse_other_versions()
    if name == "supernode":
        from flwr.supernode.cli import flower_supernode

        follow_supervisor()
        use_own_app()
        take_over_from_predecessor()
        flower_supernode()
    elif name == "superexec":
        from flwr.supercore.cli import flower_superexec

        follow_supervisor()
        launch_client_app_only()
        flower_superexec()
    elif name == "clientapp":
        from flwr.supernode.cli import flwr_clientapp

        flwr_clientapp()
    else:
        sys.exit(f"unknown Flower process '{name}'")


if __name__ == "__main__":
    main()
