"""The Flower app a silo runs: these files, whatever app a coordinator sends.

A Flower run carries code (a FAB) from the coordinator to every node, and Flower 1.41 has no self-hosted way to pin it.
So this silo never fetches one: the files below are the app, and all they do is import the installed ``silo_client``.
They equal ``coordinator/flower_app``, which a test holds, so that both sides speak of the same app.
"""

from dataclasses import dataclass
from hashlib import sha256

PYPROJECT = """\
[project]
name = "seqr-flower"
version = "1.0.0"
description = "Imports the components that seqr has installed on each side."
license = "Apache-2.0"
dependencies = ["flwr>=1.41,<1.42"]

[tool.flwr.app]
publisher = "seqr"
fab-format-version = 0

[tool.flwr.app.components]
serverapp = "seqr_flower.server_app:app"
clientapp = "seqr_flower.client_app:app"

[tool.flwr.app.config]
"""

CLIENT_APP = '''\
"""The silo's component, as installed at the silo."""

from silo_client.client_app import app

__all__ = ["app"]
'''

SERVER_APP = '''\
"""The coordinator's component, as installed at the coordinator."""

from coordinator.server_app import app

__all__ = ["app"]
'''

FILES = {
    "pyproject.toml": PYPROJECT.encode(),
    "seqr_flower/__init__.py": b"",
    "seqr_flower/client_app.py": CLIENT_APP.encode(),
    "seqr_flower/server_app.py": SERVER_APP.encode(),
}


@dataclass(frozen=True)
class ThinApp:
    """The built app: what Flower calls its id, its version, the SHA-256 of its bytes, and the bytes."""

    fab_id: str
    version: str
    digest: str
    content: bytes


def build_thin_app() -> ThinApp:
    """Build the app from the files above. Its digest depends on the zlib in use, so machines must not compare it."""
    from flwr.cli.build import build_fab_from_files
    from flwr.cli.config_utils import get_fab_metadata

    content, _ = build_fab_from_files(FILES)
    fab_id, version = get_fab_metadata(content)
    return ThinApp(fab_id, version, sha256(content).hexdigest(), content)
