"""The coordinator's tables. Users, groups, grants and the audit chain are policy's; nothing here repeats them."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.types import TypeDecorator


class UtcTime(TypeDecorator[datetime]):
    """An aware UTC time kept as fixed-width ISO text, so that both databases order and compare it alike."""

    impl = String(27)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> str | None:
        return None if value is None else value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        return None if value is None else datetime.strptime(value, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)


metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
    }
)


def _only_where(condition: str) -> dict[str, Any]:
    return {"sqlite_where": text(condition), "postgresql_where": text(condition)}


silos = Table(
    "silos",
    metadata,
    Column("silo_id", String(64), primary_key=True),
    Column("display_name", String(200), nullable=False),
    Column("status", String(16), nullable=False),
    Column("approved_at", UtcTime, nullable=False),
    Column("approved_by", String(200), nullable=False),
    # What has reached the policy store and the SuperLink; the loop repeats what a crash or an outage left out.
    Column("policy_synced", Boolean, nullable=False),
    Column("node_synced", Boolean, nullable=False),
)

silo_keys = Table(
    "silo_keys",
    metadata,
    Column("kind", String(8), primary_key=True),
    Column("public_key", String(512), primary_key=True),
    Column("silo_id", ForeignKey("silos.silo_id"), nullable=False, index=True),
    Column("added_at", UtcTime, nullable=False),
    Column("retired_at", UtcTime),
)

enrolments = Table(
    "enrolments",
    metadata,
    Column("enrolment_id", String(40), primary_key=True),
    Column("silo_id", String(64), nullable=False, index=True),
    Column("display_name", String(200), nullable=False),
    Column("signing_key", String(512), nullable=False),
    Column("node_key", String(512), nullable=False),
    Column("fingerprint", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("decided_at", UtcTime),
    Column("decided_by", String(200)),
    Column("reason", Text),
)

plans = Table(
    "plans",
    metadata,
    Column("plan_id", String(64), primary_key=True),
    Column("envelope", LargeBinary, nullable=False),
    Column("stored_at", UtcTime, nullable=False),
    Column("stored_by", String(200), nullable=False),
)

federation = Table(
    "federation",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("current_plan_id", ForeignKey("plans.plan_id"), nullable=False),
)

jobs = Table(
    "jobs",
    metadata,
    Column("job_id", String(40), primary_key=True),
    Column("silo_id", ForeignKey("silos.silo_id"), nullable=False, index=True),
    Column("plan_id", ForeignKey("plans.plan_id"), nullable=False),
    Column("kind", String(8), nullable=False),
    Column("state", String(16), nullable=False),
    Column("revision", Integer, nullable=False),
    Column("request_id", String(40), index=True),
    Column("nonce", String(64), nullable=False),
    # How many nonces this job has had: more than one means that an order ran out unanswered.
    Column("orders", Integer, nullable=False),
    Column("issued_at", UtcTime),
    Column("expires_at", UtcTime),
    Column("attempts", Integer, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("created_by", String(200), nullable=False),
    Column("queued_at", UtcTime, nullable=False),
    Column("dispatched_at", UtcTime),
    Column("finished_at", UtcTime),
    Column("code", String(64)),
    Column("message", String(300)),
    Column("attestation", LargeBinary),
    Index("uq_jobs_one_live_per_silo", "silo_id", unique=True, **_only_where("state IN ('queued', 'dispatched')")),
)

revisions = Table(
    "revisions",
    metadata,
    Column("revision_id", String(40), primary_key=True),
    Column("silo_id", ForeignKey("silos.silo_id"), nullable=False),
    Column("plan_id", ForeignKey("plans.plan_id"), nullable=False),
    Column("revision", Integer, nullable=False),
    Column("job_id", ForeignKey("jobs.job_id"), nullable=False, unique=True),
    Column("job_nonce", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("sealed_sha256", String(64), nullable=False),
    Column("sealed_bytes", Integer, nullable=False),
    Column("adapter_digest", String(80)),
    Column("code", String(64)),
    Column("message", String(300)),
    Column("created_at", UtcTime, nullable=False),
    Column("changed_at", UtcTime, nullable=False),
    UniqueConstraint("silo_id", "revision", name="uq_revisions_number_per_silo"),
    Index("uq_revisions_one_active", "silo_id", "plan_id", unique=True, **_only_where("state = 'active'")),
)

purges = Table(
    "purges",
    metadata,
    Column("revision_id", ForeignKey("revisions.revision_id"), primary_key=True),
    Column("gateway_key_id", String(64), primary_key=True),
    Column("envelope", LargeBinary, nullable=False),
    Column("received_at", UtcTime, nullable=False),
)

tombstones = Table(
    "tombstones",
    metadata,
    Column("silo_id", ForeignKey("silos.silo_id"), primary_key=True),
    Column("adapter_digest", String(80), primary_key=True),
    Column("revision_id", String(40), nullable=False),
    Column("at", UtcTime, nullable=False),
)

deletion_requests = Table(
    "deletion_requests",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("request_id", String(40), nullable=False, unique=True),
    Column("silo_id", ForeignKey("silos.silo_id"), nullable=False, index=True),
    # HMAC-SHA256 under the coordinator's salt: all that is left of the subject once the request is closed.
    Column("subject_hash", String(64), nullable=False),
    # AES-256-GCM of subject and requester under the request's own key, which is destroyed when the request closes.
    Column("subject_sealed", LargeBinary),
    Column("reason", Text, nullable=False),
    Column("filed_by", String(200), nullable=False),
    Column("state", String(20), nullable=False),
    Column("received_at", UtcTime, nullable=False),
    Column("due_at", UtcTime, nullable=False),
    Column("warned_percent", Integer, nullable=False),
    Column("closed_at", UtcTime),
    Column("duplicate_of", String(40)),
    Column("quarantined_at", UtcTime),
    Column("lifted_at", UtcTime),
    # The policy status the silo had before the first of the requests that hold it now.
    Column("restore_status", String(16)),
    Column("job_id", String(40)),
    Column("attempts", Integer, nullable=False),
    Column("attestation", LargeBinary),
    Column("revision_id", String(40)),
    Column("published_at", UtcTime),
    Column("code", String(64)),
    Column("message", String(300)),
    Index(
        "uq_deletion_requests_one_open",
        "silo_id",
        "subject_hash",
        unique=True,
        **_only_where("closed_at IS NULL"),
    ),
)

deletion_events = Table(
    "deletion_events",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("request_id", String(40), nullable=False, index=True),
    Column("at", UtcTime, nullable=False),
    Column("actor", String(200), nullable=False),
    Column("from_state", String(20)),
    Column("to_state", String(20), nullable=False),
    Column("detail", JSON, nullable=False),
)

receipts = Table(
    "receipts",
    metadata,
    Column("request_id", String(40), primary_key=True),
    Column("envelope", LargeBinary, nullable=False),
    Column("issued_at", UtcTime, nullable=False),
)

# Audit rows live in policy's database. They are written here in the transaction they describe and carried over
# afterwards, each exactly once, so that a crash between the two databases neither loses nor doubles one.
outbox = Table(
    "outbox",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("event_id", String(40), nullable=False, unique=True),
    Column("actor", String(200), nullable=False),
    Column("action", String(64), nullable=False),
    Column("detail", JSON, nullable=False),
    Column("reason", Text, nullable=False),
)
