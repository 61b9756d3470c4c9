"""The coordinator's component, as installed at the coordinator."""

from coordinator.server_app import app

__all__ = ["app"]
