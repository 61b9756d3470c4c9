"""The registry of silos: who is in, which keys are whose, and whose node may connect."""

from typing import Any, Protocol

from sqlalchemy import Connection, Engine, select, update

from coordinator import outbox
from coordinator.db import Row, reading, writing
from coordinator.errors import IllegalTransition, SiloUnknown
from coordinator.models import enrolments, silo_keys, silos
from seqr.keys import VerifyKey

TRANSITIONS = {"approved": frozenset({"suspended"}), "suspended": frozenset({"approved"})}


class NodeRegistry(Protocol):
    """Which node keys the SuperLink lets in; ``coordinator.flower_nodes.FlowerNodes`` in production."""

    def register(self, silo_id: str, node_key: str) -> None: ...

    def unregister(self, node_key: str) -> None: ...


def suspend(engine: Engine, silo_id: str, actor: str, reason: str) -> None:
    """Shut an approved silo out: nobody may use it, it gets no work. Raises SiloUnknown, IllegalTransition."""
    with writing(engine) as connection:
        silo = require_silo(connection, silo_id, lock=True)
        if "suspended" not in TRANSITIONS[silo["status"]]:
            raise IllegalTransition(f"silo {silo_id}", silo["status"], "suspended")
        values = {"status": "suspended", "policy_synced": False, "node_synced": False}
        connection.execute(update(silos).where(silos.c.silo_id == silo_id).values(values))
        outbox.record(connection, actor, "silo.suspended", {"silo_id": silo_id}, reason)


def approved_nodes(engine: Engine) -> dict[str, str]:
    """Node key -> silo id of every approved silo: exactly the keys a SuperLink is to let in."""
    with reading(engine) as connection:
        query = (
            select(silo_keys.c.public_key, silos.c.silo_id)
            .join(silos)
            .where(silos.c.status == "approved", silo_keys.c.kind == "node", silo_keys.c.retired_at.is_(None))
        )
        return {row.public_key: row.silo_id for row in connection.execute(query)}


def signing_keys(connection: Connection, silo_id: str) -> list[VerifyKey]:
    """The keys whose signatures count for this silo now."""
    return [VerifyKey.from_b64(text) for text in keys_of(connection, silo_id, "signing")]


def all_signing_keys(connection: Connection, silo_id: str) -> list[VerifyKey]:
    """Those and the retired ones, for what was signed before a key was changed."""
    return [VerifyKey.from_b64(text) for text in keys_of(connection, silo_id, "signing", retired=True)]


def keys_of(connection: Connection, silo_id: str, kind: str, retired: bool = False) -> list[str]:
    query = select(silo_keys.c.public_key).where(silo_keys.c.silo_id == silo_id, silo_keys.c.kind == kind)
    if not retired:
        query = query.where(silo_keys.c.retired_at.is_(None))
    return list(connection.execute(query.order_by(silo_keys.c.added_at)).scalars())


def require_silo(connection: Connection, silo_id: str, lock: bool = False) -> Row:
    """The silo; with ``lock``, held until the transaction ends. Raises SiloUnknown."""
    query = select(silos).where(silos.c.silo_id == silo_id)
    silo = connection.execute(query.with_for_update() if lock else query).mappings().first()
    if silo is None:
        raise SiloUnknown(f"there is no silo {silo_id!r:.80} here; ids are compared letter by letter")
    return silo


def listing(connection: Connection) -> list[dict[str, Any]]:
    """Enrolled silos and pending requests, by id."""
    found = [
        {
            "silo_id": row["silo_id"],
            "display_name": row["display_name"],
            "status": row["status"],
            "fingerprints": sorted(fingerprints(connection, row["silo_id"])),
            # What a privacy officer needs to check a receipt; a retired key still vouches for what it signed.
            "signing_keys": sorted(key.to_b64() for key in all_signing_keys(connection, row["silo_id"])),
            "since": row["approved_at"],
            "connected_keys_current": row["node_synced"],
        }
        for row in connection.execute(select(silos)).mappings()
    ]
    for row in connection.execute(select(enrolments).where(enrolments.c.state == "pending")).mappings():
        found.append(
            {
                "silo_id": row["silo_id"],
                "display_name": row["display_name"],
                "status": "pending",
                "fingerprints": [row["fingerprint"]],
                "signing_keys": [row["signing_key"]],
                "since": row["created_at"],
                "connected_keys_current": False,
            }
        )
    return sorted(found, key=lambda silo: (silo["silo_id"].encode(), silo["status"], silo["since"]))


def fingerprints(connection: Connection, silo_id: str) -> set[str]:
    return {key.fingerprint for key in signing_keys(connection, silo_id)}
