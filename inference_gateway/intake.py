"""Keeps the engine's adapters equal to the coordinator's active revisions: open, check, recalibrate, admit, purge.

Opened adapters live in memory only. Every pass starts from what the coordinator lists, so a gateway that was killed at
any point finds its way back: what was staged is checked again, what is active is loaded, what is retired is purged.
"""

import asyncio
import gc
import hashlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from http import HTTPStatus

import torch

from inference_gateway.coordinator_client import CoordinatorClient, RemoteRevision
from inference_gateway.engine.base import AdapterKey, Engine
from inference_gateway.errors import BundleDigestMismatch, CoordinatorRefused, CoordinatorUnreachable, EngineStopped
from seqr.adapter import Adapter
from seqr.bundle import largest_bundle, open_sealed
from seqr.document import utc_now, utc_text
from seqr.errors import SeqrError
from seqr.intake import Expectation, adapter_norms, check_bundle
from seqr.keys import SealingKey, SigningKey
from seqr.library import Statistics
from seqr.plan import Plan
from seqr.public_calibration import calibrate
from seqr.purge import PurgeAcknowledgement, sign_purge

log = logging.getLogger(__name__)

MAX_MESSAGE = 2000

# Where a revision was while it was served, and is no more once the engine has let go of it. It never was on a disk.
PURGED_FROM = ("device memory", "host memory", "key-value cache", "evidence state")


@dataclass(frozen=True)
class Checked:
    """An adapter that passed intake, with its statistics on public text (None where the plan trusts the silo's own)."""

    key: AdapterKey
    adapter: Adapter
    statistics: Statistics | None


@dataclass
class IntakeStatus:
    """What an operator wants to know. ``settled``: every active revision has been loaded or refused at least once.

    ``loaded`` and ``removed`` count adapters since the start.
    """

    settled: bool = False
    loaded: int = 0
    removed: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    other_plans: set[str] = field(default_factory=set)
    last_error: str | None = None


class Intake:
    """One gateway's intake under one plan. ``z`` is ``seqr.public_calibration.collect_z`` of the public text."""

    def __init__(
        self,
        client: CoordinatorClient,
        engine: Engine,
        plan: Plan,
        sealing_key: SealingKey,
        signing_key: SigningKey,
        z: Mapping[str, torch.Tensor],
        clock: Callable[[], datetime] = utc_now,
    ):
        self._client = client
        self._engine = engine
        self._plan = plan
        self._sealing_key = sealing_key
        self._signing_key = signing_key
        self._z = z
        self._clock = clock
        self._norms: dict[str, dict[str, float]] = {}
        self._nonces: dict[str, str] = {}
        self._left: dict[tuple[str, int], int] = {}
        self._purged: set[str] = set()
        self._problems: set[str] = set()
        self._known_problems: set[str] = set()
        self.status = IntakeStatus()

    async def run(self, poll_seconds: float) -> None:
        """Reconcile again and again, until cancelled; an error delays, and is logged once."""
        while True:
            try:
                await self.reconcile()
            except Exception as error:  # noqa: BLE001 - noted, and the next pass begins anew
                self._note("the pass", error)
            await asyncio.sleep(poll_seconds)

    async def reconcile(self) -> None:
        """One pass. Raises CoordinatorUnreachable or EngineStopped; all else is a verdict."""
        self._known_problems, self._problems = self._problems, set()
        revisions = await self._client.revisions()
        # First of all: what may no longer be served must not wait for what may be served soon.
        await self._drop(revisions)
        for one in revisions:
            if one.state == "staged" and self._mine(one):
                await self._unhindered(self._take_in, one)
        if any(one.state == "staged" for one in revisions):
            revisions = await self._client.revisions()
            await self._drop(revisions)
        for one in revisions:
            if one.state == "active" and self._mine(one) and not self._holds(one):
                await self._unhindered(self._take_in, one)
        leaving = [one for one in revisions if one.state == "retired" and one.revision_id not in self._purged]
        if leaving:
            gc.collect()  # once for all of them: meanwhile nothing else runs in this process
        for one in leaving:
            await self._unhindered(self._purge, one)
        if not self._problems:
            self.status.settled, self.status.last_error = True, None

    async def _unhindered(self, deed: Callable[[RemoteRevision], Awaitable[None]], one: RemoteRevision) -> None:
        """What goes wrong with one revision must not keep the others waiting: it is tried again at the next pass."""
        try:
            await deed(one)
        except EngineStopped:
            raise
        except Exception as error:  # noqa: BLE001 - noted, whatever it was
            self._note(f"revision {one.revision_id}", error)

    def _note(self, whose: str, error: Exception) -> None:
        """Log a problem that the pass before did not have."""
        known = isinstance(error, SeqrError)
        problem = f"{whose}: {error.code}: {error}" if isinstance(error, SeqrError) else f"{whose}: {error!r}"
        if problem not in self._known_problems | self._problems:
            log.warning("intake waits: %s", problem, exc_info=None if known else error)
        self._problems.add(problem)
        self.status.last_error = problem

    def _mine(self, one: RemoteRevision) -> bool:
        if one.plan_id != self._plan.plan_id:
            if one.plan_id not in self.status.other_plans:
                self.status.other_plans.add(one.plan_id)
                log.warning(
                    "revision %s is for plan %s, this gateway serves plan %s: restart it to serve the current plan",
                    one.revision_id,
                    one.plan_id,
                    self._plan.plan_id,
                )
            return False
        return one.revision_id not in self.status.refused

    def _holds(self, one: RemoteRevision) -> bool:
        return any((k.silo_id, k.revision) == (one.silo_id, one.revision) for k in self._engine.info().adapters)

    async def _take_in(self, one: RemoteRevision) -> None:
        """Check a staged or active revision; load it when sound, report it quarantined by name when not."""
        try:
            blob = await self._client.bundle(one.revision_id, largest_bundle(self._plan))
        except CoordinatorRefused as error:
            if error.status != HTTPStatus.GONE:
                raise
            log.warning("revision %s of silo %s can be had no more: %s", one.revision_id, one.silo_id, error)
            self.status.refused[one.revision_id] = error.remote_code
            return
        try:
            checked = await asyncio.to_thread(self.check, one, blob)
        except SeqrError as error:
            log.warning("revision %s of silo %s is refused: %s: %s", one.revision_id, one.silo_id, error.code, error)
            await self._refuse(one, error)
            return
        if one.state == "staged":
            try:
                await self._client.admitted(one.revision_id, checked.adapter.digest)
            except CoordinatorRefused as error:
                if error.status != 409:
                    raise
                # Superseded or tombstoned meanwhile: the coordinator has recorded why.
                log.warning("revision %s is not admitted: %s", one.revision_id, error)
                self.status.refused[one.revision_id] = error.remote_code
                return
        before = [k for k in self._engine.info().adapters if k.silo_id == one.silo_id]
        version = await self._engine.load(checked.key, checked.adapter, checked.statistics)
        self.status.loaded += 1
        for key in before:
            self._left[key.silo_id, key.revision] = version
        self._norms[one.silo_id] = adapter_norms(checked.adapter)
        self._nonces[one.revision_id] = one.job_nonce
        log.info("revision %s of silo %s is loaded as %s", one.revision_id, one.silo_id, checked.key)

    async def _refuse(self, one: RemoteRevision, error: SeqrError) -> None:
        try:
            await self._client.quarantined(one.revision_id, error.code, str(error)[:MAX_MESSAGE])
        except CoordinatorRefused as refusal:
            if refusal.status != 409:
                raise
        self.status.refused[one.revision_id] = error.code

    def check(self, one: RemoteRevision, blob: bytes) -> Checked:
        """Open, check and recalibrate. Raises ``BundleDigestMismatch`` or the ``BundleRefused`` that names the rule."""
        if len(blob) <= largest_bundle(self._plan):
            got = hashlib.sha256(blob).hexdigest()
            if got != one.sealed_sha256:
                raise BundleDigestMismatch(
                    f"the bundle has SHA-256 {got}, the coordinator registered {one.sealed_sha256}; it was changed"
                )
        opened = open_sealed(blob, self._sealing_key, largest_bundle(self._plan))
        expectation = Expectation(
            silo_id=one.silo_id,
            silo_keys=one.silo_keys,
            revision=one.revision,
            job_nonce=one.job_nonce,
            tombstoned_digests=one.tombstoned_digests,
            now=self._clock(),
            used_nonces=frozenset(nonce for known, nonce in self._nonces.items() if known != one.revision_id),
            already_admitted=one.state == "active",
        )
        peers = [norms for silo_id, norms in self._norms.items() if silo_id != one.silo_id]
        library_norms = {spec.name: [norms[spec.name] for norms in peers] for spec in self._plan.modules}
        adapter = check_bundle(opened, self._plan, expectation, library_norms)
        statistics = calibrate(adapter, self._z) if self._plan.calibration == "public" else None
        return Checked(AdapterKey(one.silo_id, one.revision, adapter.digest), adapter, statistics)

    async def _drop(self, revisions: Sequence[RemoteRevision]) -> None:
        """Let go of everything that is not active any more, whatever became of it."""
        active = {(one.silo_id, one.revision) for one in revisions if one.state == "active"}
        for key in self._engine.info().adapters:
            if (key.silo_id, key.revision) not in active:
                self._left[key.silo_id, key.revision] = await self._engine.revoke(key)
                self.status.removed += 1
                self._norms.pop(key.silo_id, None)
                log.info("%s has left the library", key)

    async def _purge(self, one: RemoteRevision) -> None:
        """Swear that a retired revision is gone; ``_drop`` or its successor has removed it by now."""
        if one.adapter_digest is None:
            raise CoordinatorUnreachable(f"the coordinator retires revision {one.revision_id} without its digest")
        version = self._left.get((one.silo_id, one.revision), self._engine.info().library_version)
        claim = PurgeAcknowledgement(
            revision_id=one.revision_id,
            silo_id=one.silo_id,
            adapter_digest=one.adapter_digest,
            gateway_key_id=self._sealing_key.public.key_id,
            library_version=version,
            purged_at=utc_text(self._clock()),
            where=PURGED_FROM,
        )
        try:
            await self._client.purged(one.revision_id, sign_purge(claim, self._signing_key))
        except CoordinatorRefused as error:
            if error.status != 409:
                raise
            log.warning("the purge of revision %s was not accepted: %s", one.revision_id, error)
        self._purged.add(one.revision_id)
