"""What the routes share: the opened coordinator and the driver, kept in the app's state."""

from dataclasses import dataclass

from fastapi import Request

from coordinator.core import Coordinator
from coordinator.driver import Driver
from coordinator.reconcile import Reconciler


@dataclass(frozen=True)
class Services:
    coordinator: Coordinator
    driver: Driver
    reconciler: Reconciler


def services(request: Request) -> Services:
    """The dependency that gives them to a route."""
    found: Services = request.app.state.services
    return found
