"""Erasing a subject at the owner's own wish, without an order from the coordinator."""

from seqr.keys import VerifyKey
from silo_client.config import SiloConfig
from silo_client.erased import Tombstones
from silo_client.erasure import erase, find
from silo_client.errors import PlanMissing
from silo_client.jobs import old_adapter_digest
from silo_client.records import collect, commitments
from silo_client.state import State


def count(config: SiloConfig, subject: str) -> int:
    """How many rows an erasure would remove."""
    return sum(len(match.digests) for match in find(config, subject))


def forget_subject(config: SiloConfig, state: State, subject: str) -> int:
    """Erase ``subject`` and return how many of its records were removed, earlier erasures included.

    Raises:
        SubjectUnknown: no row is about the subject; nothing was changed.
        DataError: a data file cannot be read or is being written to.
    """
    tombstones = Tombstones(state)
    try:
        plan = state.latest_plan(VerifyKey.from_b64(config.coordinator.public_key))
    except PlanMissing:
        # Without a plan nothing was ever sent, so no receipt will speak of this root: lengths need not be checked.
        found = collect(config, is_erased=tombstones.is_erased, may_be_empty=tombstones.emptied)
        usable, old = commitments(found.records, state.salt), None
    else:
        from silo_client.adapters import current_corpus

        usable = list(current_corpus(config, state, plan).commitments)
        old = old_adapter_digest(state, plan.plan_id)
    tombstone = erase(config, state, tombstones, subject, usable=usable, old_adapter_digest=old)
    return len(tombstone.removed_commitments)
