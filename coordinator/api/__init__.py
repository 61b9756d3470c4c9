"""The REST API of the control plane, one file per resource."""

from coordinator.api.app import create_app

__all__ = ["create_app"]
