"""The silo's component, as installed at the silo."""

from silo_client.client_app import app

__all__ = ["app"]
