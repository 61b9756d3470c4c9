"""Getting rid of adapters for good: gateways' acknowledgements, destruction, and the tombstones that keep them away."""

from collections.abc import Sequence

from sqlalchemy import Connection, insert, select, update

from coordinator import outbox, plans
from coordinator.core import Coordinator
from coordinator.db import Row, now, reading, writing
from coordinator.errors import IllegalTransition, PurgeInvalid
from coordinator.models import purges, revisions, tombstones
from coordinator.revisions import R, below, destroy, get, locked, named, tombstoned
from seqr import dsse
from seqr.errors import SeqrError
from seqr.keys import VerifyKey
from seqr.purge import MAX_PURGE_BYTES, verify_purge

# Base64 takes a third more than the payload.
MAX_PURGE_ENVELOPE_BYTES = 2 * MAX_PURGE_BYTES


def acknowledge_purge(c: Coordinator, revision_id: str, acknowledgement: bytes) -> str:
    """A gateway swears that it holds the retired revision no more; returns the revision's state.

    When every gateway of the revision's plan has sworn, the revision is destroyed. Raises RevisionUnknown,
    IllegalTransition, PurgeInvalid.
    """
    with writing(c.engine) as connection:
        row = locked(connection, revision_id)
        if row["state"] not in (R.RETIRED, R.DESTROYED):
            raise IllegalTransition(f"revision {revision_id}", row["state"], R.DESTROYED)
        gateway = _check_purge(connection, row, acknowledgement)
        key = {"revision_id": revision_id, "gateway_key_id": gateway}
        known = select(purges.c.revision_id).filter_by(**key)
        if connection.execute(known).first() is None:
            connection.execute(insert(purges).values(**key, envelope=acknowledgement, received_at=now()))
            outbox.record(
                connection, f"gateway:{gateway}", "revision.purged", dict(named(row)), "the gateway acknowledged it"
            )
    destroy_purged(c)
    with reading(c.engine) as connection:
        return str(get(connection, revision_id)["state"])


def destroy_purged(c: Coordinator) -> None:
    """Destroy every retired revision that no gateway holds any more."""
    with reading(c.engine) as connection:
        retired = connection.execute(select(revisions).where(revisions.c.state == R.RETIRED)).mappings().all()
        gone = [row for row in retired if is_purged(connection, row)]
    for row in gone:
        destroy(c, row["revision_id"], "no gateway holds it any more")


def learn_digest(connection: Connection, silo_id: str, number: int, digest: str | None) -> None:
    """The silo swears that ``digest`` is the last adapter it handed in before ``number``.

    Where no revision is known by it, it must be the newest of those that intake never told the digest of.
    """
    older = below(connection, silo_id, number)
    nameless = [row for row in older if row["adapter_digest"] is None and row["state"] != R.DESTROYED]
    if digest is not None and nameless and digest not in {row["adapter_digest"] for row in older}:
        newest = revisions.c.revision_id == nameless[-1]["revision_id"]
        connection.execute(update(revisions).where(newest).values(adapter_digest=digest))


def unburied(connection: Connection, rows: Sequence[Row]) -> dict[str, Row]:
    """The adapters (by digest) of ``rows``, all of one silo, that could still be admitted once more.

    An adapter that is byte for byte the active one is left out: it never depended on what was deleted.
    """
    if not rows:
        return {}
    silo_id = rows[0]["silo_id"]
    settled = tombstoned(connection, silo_id) | _active_digests(connection, silo_id)
    digests = {row["adapter_digest"]: row for row in rows if row["adapter_digest"] is not None}
    return {digest: row for digest, row in digests.items() if digest not in settled}


def bury(connection: Connection, rows: Sequence[Row]) -> None:
    """Tombstone the adapters of ``rows``, all of one silo: never again may one be admitted."""
    for digest, row in unburied(connection, rows).items():
        grave = {"silo_id": row["silo_id"], "adapter_digest": digest, "revision_id": row["revision_id"], "at": now()}
        connection.execute(insert(tombstones).values(grave))


def is_purged(connection: Connection, row: Row) -> bool:
    """Whether every gateway of the revision's plan has acknowledged its purge."""
    gateways = {key.key_id for key in plans.load(connection, row["plan_id"]).gateway_keys}
    return gateways <= {gateway for gateway, _ in purge_envelopes(connection, row["revision_id"])}


def purge_envelopes(connection: Connection, revision_id: str) -> list[tuple[str, bytes]]:
    """(gateway key id, DSSE envelope) of every acknowledgement, by key id."""
    query = select(purges.c.gateway_key_id, purges.c.envelope).where(purges.c.revision_id == revision_id)
    return [(row[0], bytes(row[1])) for row in connection.execute(query.order_by(purges.c.gateway_key_id))]


def _check_purge(connection: Connection, row: Row, raw: bytes) -> str:
    """The key id of the gateway that signed; raises PurgeInvalid."""
    gateways = plans.load(connection, row["plan_id"]).gateway_keys
    keys = {key.key_id: VerifyKey.from_b64(key.signing_key) for key in gateways}
    try:
        envelope = dsse.Envelope.from_json(raw, MAX_PURGE_ENVELOPE_BYTES)
        claim = verify_purge(envelope, keys.values())
        key = keys.get(claim.gateway_key_id)
        if key is None:
            raise PurgeInvalid(f"gateway key {claim.gateway_key_id!r:.40} is not in the plan of this revision")
        verify_purge(envelope, [key])
    except PurgeInvalid:
        raise
    except SeqrError as error:
        raise PurgeInvalid(f"the purge acknowledgement cannot be trusted: {error}") from None
    for name in ("revision_id", "silo_id", "adapter_digest"):
        if getattr(claim, name) != row[name]:
            raise PurgeInvalid(f"the purge acknowledgement is for {name} {getattr(claim, name)!r:.80}, not {row[name]}")
    return claim.gateway_key_id


def _active_digests(connection: Connection, silo_id: str) -> set[str]:
    query = select(revisions.c.adapter_digest).where(revisions.c.silo_id == silo_id, revisions.c.state == R.ACTIVE)
    return set(connection.execute(query).scalars())
