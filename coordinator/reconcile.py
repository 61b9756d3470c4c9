"""Brings policy and the SuperLink to what the registry of silos says, after a decision and after an outage alike."""

import logging
import time

from sqlalchemy import select, update

from coordinator import silos as registry
from coordinator.core import Coordinator
from coordinator.db import reading, writing
from coordinator.errors import CoordinatorError
from coordinator.job_queue import is_held
from coordinator.models import silo_keys, silos
from coordinator.outbox import COORDINATOR
from coordinator.silos import NodeRegistry
from policy.errors import SiloExists, SiloStatusChanged
from policy.silos import require_silo as require_policy_silo
from policy.transaction import named_database_errors

logger = logging.getLogger(__name__)


def policy_status(c: Coordinator, silo_id: str) -> str:
    """The silo's status in policy. Raises policy's SiloUnknown."""
    with named_database_errors(), c.policy_engine.connect() as connection:
        return require_policy_silo(connection, silo_id).status


class Reconciler:
    """Every call may be repeated; each silo is taken by itself, so one that fails holds no other up."""

    def __init__(self, coordinator: Coordinator, nodes: NodeRegistry, retry_seconds: float = 5.0) -> None:
        self._c = coordinator
        self._nodes = nodes
        self._retry_seconds = retry_seconds
        # Silo -> when to ask the SuperLink again (monotonic), and what it said last.
        self._failed: dict[str, tuple[float, str]] = {}

    def sync_policy(self, silo_id: str) -> None:
        """Make the silo known to policy with the status it should have. Raises PolicyError."""
        with reading(self._c.engine) as connection:
            silo = registry.require_silo(connection, silo_id)
            held = is_held(connection, silo_id)
        wanted = "active" if silo["status"] == "approved" else "suspended"
        reason = f"the silo was {silo['status']} by {silo['approved_by']}"
        try:
            status = "quarantined" if held else wanted
            self._c.policy.add_silo(silo_id, silo["display_name"], status, actor=COORDINATOR, reason=reason)
        except SiloExists:
            present = policy_status(self._c, silo_id)
            # A quarantine is lifted by the deletion request that holds it and by nobody else.
            if present != wanted and not (present == "quarantined" and (held or wanted == "active")):
                try:
                    self._c.policy.set_silo_status(
                        silo_id, wanted, expected_status=present, actor=COORDINATOR, reason=reason
                    )
                except SiloStatusChanged:
                    return
        self._mark(silo_id, silo["status"], "policy_synced")

    def sync_nodes(self, silo_id: str) -> None:
        """Let the silo's node keys in, or shut them out. Raises CoordinatorError when the SuperLink does not answer."""
        with reading(self._c.engine) as connection:
            silo = registry.require_silo(connection, silo_id)
            keys = connection.execute(
                select(silo_keys.c.public_key, silo_keys.c.retired_at).where(
                    silo_keys.c.silo_id == silo_id, silo_keys.c.kind == "node"
                )
            ).all()
        for key, retired_at in keys:
            if silo["status"] != "approved" or retired_at is not None:
                self._nodes.unregister(key)
            else:
                self._nodes.register(silo_id, key)
        self._mark(silo_id, silo["status"], "node_synced")

    def catch_up(self) -> None:
        """Repeat for every silo what has not been done yet; failures are logged and tried again at the next call."""
        with reading(self._c.engine) as connection:
            late = connection.execute(
                select(silos.c.silo_id, silos.c.policy_synced, silos.c.node_synced).where(
                    silos.c.policy_synced.is_(False) | silos.c.node_synced.is_(False)
                )
            ).all()
        for silo_id, policy_synced, node_synced in late:
            if not policy_synced:
                self.sync_policy(silo_id)
            again_at, said = self._failed.get(silo_id, (0.0, ""))
            if node_synced or time.monotonic() < again_at:
                continue
            try:
                self.sync_nodes(silo_id)
                self._failed.pop(silo_id, None)
            except CoordinatorError as error:
                self._failed[silo_id] = (time.monotonic() + self._retry_seconds, error.code)
                if error.code != said:
                    logger.warning("the node key of silo %s is not settled: %s", silo_id, error)

    def _mark(self, silo_id: str, status: str, column: str) -> None:
        # Only if the status is still the one that was carried out.
        same = update(silos).where(silos.c.silo_id == silo_id, silos.c.status == status)
        with writing(self._c.engine) as connection:
            connection.execute(same.values({column: True}))
