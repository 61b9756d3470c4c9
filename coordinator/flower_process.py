"""Flower's processes, as the coordinator runs them: ``python -m coordinator.flower_process superlink|superexec ...``.

The SuperLink is Flower's, unchanged. The SuperExec starts one program only: the ServerApp of the app that is installed
here. Flower's Control API has no login, so whoever reaches the SuperLink's port may submit a run; without this, its
code would be executed with the coordinator's rights. The task token travels in a file, not in ``argv``.
"""

import os
import subprocess
import sys
from hashlib import sha256
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coordinator.errors import CoordinatorError
from seqr.files import write_private
from seqr.supervisor import follow_supervisor

if TYPE_CHECKING:
    from flwr.supercore.superexec.executor.types import ExecutionSpec, LaunchResult

FLOWER_VERSION = "1.41.0"
TOKEN_DIRECTORY = "SEQR_FLOWER_TOKEN_DIR"
# Held by the resident ServerApp for as long as it lives.
LOCK_NAME = "serverapp.lock"


class FlowerVersionUnsupported(CoordinatorError):
    """The installed Flower is not the one this was written for."""

    code = "flower_version_unsupported"
    status = 500


def refuse_other_versions() -> None:
    """Raises FlowerVersionUnsupported unless exactly the Flower this module was written for is installed."""
    from flwr.supercore.version import package_version

    if package_version != FLOWER_VERSION:
        raise FlowerVersionUnsupported(
            f"flwr {package_version} is installed, but the coordinator runs only with flwr {FLOWER_VERSION}: "
            f"pip install flwr=={FLOWER_VERSION}"
        )


def build_app() -> bytes:
    """The bytes of the app that every run carries, built from coordinator/flower_app."""
    from flwr.cli.build import build_fab_from_disk

    with as_file(files("coordinator") / "flower_app") as folder:
        content: bytes = build_fab_from_disk(folder)
    return content


def launch_own_server_app_only() -> None:
    """Make the SuperExec start the installed ServerApp and refuse every other task."""
    from flwr.supercore.constant import TaskType
    from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor
    from flwr.supercore.superexec.executor.types import LaunchResult

    own = sha256(build_app()).hexdigest()
    tokens = Path(os.environ[TOKEN_DIRECTORY])
    tokens.mkdir(parents=True, exist_ok=True, mode=0o700)

    def launch(_executor: Any, spec: "ExecutionSpec") -> "LaunchResult":
        if spec.task_type is not TaskType.SERVER_APP or spec.fab_hash != own:
            return LaunchResult.failed("this coordinator runs its own ServerApp and nothing else")
        token = tokens / f"{spec.task_id}.token"
        write_private(token, spec.token.encode())
        command = [sys.executable, "-m", "coordinator.flower_process", "serverapp"]
        command += ["--runtime-api-address", spec.runtime_api_address, "--token-file", str(token)]
        command += ["--parent-pid", str(os.getpid())]
        command += ["--root-certificates", spec.root_certificates_path] if spec.root_certificates_path else []
        subprocess.Popen(command)
        return LaunchResult.accepted()

    SubprocessExecutor.launch = launch


def main() -> None:
    """Run one of Flower's processes with the arguments that follow its name."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    sys.argv = [f"flower-{name}", *sys.argv[2:]]
    refuse_other_versions()
    if name == "superlink":
        from flwr.superlink.cli import flower_superlink

        follow_supervisor()
        flower_superlink()
    elif name == "superexec":
        from flwr.supercore.cli import flower_superexec

        follow_supervisor()
        launch_own_server_app_only()
        flower_superexec()
    elif name == "serverapp":
        from flwr.superlink.cli import flwr_serverapp

        flwr_serverapp()
    else:
        sys.exit(f"unknown Flower process '{name}'")


if __name__ == "__main__":
    main()
