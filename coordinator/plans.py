"""Plans: stored as signed, one of them current. A plan never changes; a new one takes its place."""

from sqlalchemy import Connection, delete, insert, select, update

from coordinator import outbox
from coordinator.db import Row, now
from coordinator.errors import PlanMissing, PlanUnknown, PlanUnreadable
from coordinator.models import federation, jobs, plans
from seqr import dsse
from seqr.canonical import parse_json
from seqr.errors import SeqrError
from seqr.keys import VerifyKey
from seqr.plan import MAX_PLAN_BYTES, Plan, verify_plan

# Base64 in the envelope takes a third more than the payload, and the signatures come on top.
MAX_ENVELOPE_BYTES = 2 * MAX_PLAN_BYTES
_ONLY = 1


def store(connection: Connection, envelope: bytes, key: VerifyKey, actor: str, reason: str) -> Plan:
    """Check a signed plan, keep it and make it current; storing the same plan again only makes it current.

    Jobs that have not been sent yet follow to the new plan. Raises PlanUnreadable, PlanSignatureInvalid, PlanMalformed.
    """
    plan = verify_plan(read_envelope(envelope), key)
    known = connection.execute(select(plans.c.plan_id).where(plans.c.plan_id == plan.plan_id)).first()
    if known is None:
        row = {"plan_id": plan.plan_id, "envelope": envelope, "stored_at": now(), "stored_by": actor}
        connection.execute(insert(plans).values(row))
    if current_id(connection) != plan.plan_id:
        connection.execute(delete(federation))
        connection.execute(insert(federation).values(id=_ONLY, current_plan_id=plan.plan_id))
        unsent = update(jobs).where(jobs.c.state == "queued", jobs.c.orders == 0)
        connection.execute(unsent.values(plan_id=plan.plan_id))
        outbox.record(connection, actor, "plan.current", {"plan_id": plan.plan_id}, reason)
    return plan


def read_envelope(data: bytes) -> dsse.Envelope:
    """Raises PlanUnreadable."""
    try:
        return dsse.Envelope.from_json(data, MAX_ENVELOPE_BYTES)
    except SeqrError as error:
        raise PlanUnreadable(f"this is no signed plan: {error}") from None


def current(connection: Connection) -> str:
    """The id of the current plan. Raises PlanMissing."""
    plan_id = current_id(connection)
    if plan_id is None:
        raise PlanMissing("there is no plan yet; create one with `seqr coordinator plan create`")
    return plan_id


def current_id(connection: Connection) -> str | None:
    return connection.execute(select(federation.c.current_plan_id)).scalar()


def envelope(connection: Connection, plan_id: str) -> bytes:
    """The signed plan, byte by byte as it was stored. Raises PlanUnknown."""
    found = connection.execute(select(plans.c.envelope).where(plans.c.plan_id == plan_id)).scalar()
    if found is None:
        raise PlanUnknown(f"there is no plan {plan_id!r:.80}")
    return bytes(found)


def load(connection: Connection, plan_id: str) -> Plan:
    """The stored plan, whose signature was checked when it came in. Raises PlanUnknown."""
    payload = dsse.Envelope.from_json(envelope(connection, plan_id), MAX_ENVELOPE_BYTES).payload
    return Plan.from_dict(parse_json(payload, "the plan", MAX_PLAN_BYTES))


def listing(connection: Connection) -> list[Row]:
    """Newest first, without the envelopes."""
    query = select(plans.c.plan_id, plans.c.stored_at, plans.c.stored_by).order_by(plans.c.stored_at.desc())
    return list(connection.execute(query).mappings())
