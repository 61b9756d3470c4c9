"""The control plane's tables."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "deletion_events",
        sa.Column("number", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("request_id", sa.String(length=40), nullable=False),
        sa.Column("at", sa.String(length=27), nullable=False),
        sa.Column("actor", sa.String(length=200), nullable=False),
        sa.Column("from_state", sa.String(length=20), nullable=True),
        sa.Column("to_state", sa.String(length=20), nullable=False),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_deletion_events")),
    )
    op.create_index(op.f("ix_deletion_events_request_id"), "deletion_events", ["request_id"], unique=False)
    op.create_table(
        "enrolments",
        sa.Column("enrolment_id", sa.String(length=40), nullable=False),
        sa.Column("silo_id", sa.String(length=64), nullable=False),
        sa.Column("display_name", sa.String(length=200), nullable=False),
        sa.Column("signing_key", sa.String(length=512), nullable=False),
        sa.Column("node_key", sa.String(length=512), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("created_at", sa.String(length=27), nullable=False),
        sa.Column("decided_at", sa.String(length=27), nullable=True),
        sa.Column("decided_by", sa.String(length=200), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("enrolment_id", name=op.f("pk_enrolments")),
    )
    op.create_index(op.f("ix_enrolments_silo_id"), "enrolments", ["silo_id"], unique=False)
    op.create_table(
        "outbox",
        sa.Column("number", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("event_id", sa.String(length=40), nullable=False),
        sa.Column("actor", sa.String(length=200), nullable=False),
        sa.Column("action", sa.String(length=64), nullable=False),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_outbox")),
        sa.UniqueConstraint("event_id", name=op.f("uq_outbox_event_id")),
    )
    op.create_table(
        "plans",
        sa.Column("plan_id", sa.String(length=64), nullable=False),
        sa.Column("envelope", sa.LargeBinary(), nullable=False),
        sa.Column("stored_at", sa.String(length=27), nullable=False),
        sa.Column("stored_by", sa.String(length=200), nullable=False),
        sa.PrimaryKeyConstraint("plan_id", name=op.f("pk_plans")),
    )
    op.create_table(
        "receipts",
        sa.Column("request_id", sa.String(length=40), nullable=False),
        sa.Column("envelope", sa.LargeBinary(), nullable=False),
        sa.Column("issued_at", sa.String(length=27), nullable=False),
        sa.PrimaryKeyConstraint("request_id", name=op.f("pk_receipts")),
    )
    op.create_table(
        "silos",
        sa.Column("silo_id", sa.String(length=64), nullable=False),
        sa.Column("display_name", sa.String(length=200), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("approved_at", sa.String(length=27), nullable=False),
        sa.Column("approved_by", sa.String(length=200), nullable=False),
        sa.Column("policy_synced", sa.Boolean(), nullable=False),
        sa.Column("node_synced", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("silo_id", name=op.f("pk_silos")),
    )
    op.create_table(
        "deletion_requests",
        sa.Column("number", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("request_id", sa.String(length=40), nullable=False),
        sa.Column("silo_id", sa.String(length=64), nullable=False),
        sa.Column("subject_hash", sa.String(length=64), nullable=False),
        sa.Column("subject_sealed", sa.LargeBinary(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("filed_by", sa.String(length=200), nullable=False),
        sa.Column("state", sa.String(length=20), nullable=False),
        sa.Column("received_at", sa.String(length=27), nullable=False),
        sa.Column("due_at", sa.String(length=27), nullable=False),
        sa.Column("warned_percent", sa.Integer(), nullable=False),
        sa.Column("closed_at", sa.String(length=27), nullable=True),
        sa.Column("duplicate_of", sa.String(length=40), nullable=True),
        sa.Column("quarantined_at", sa.String(length=27), nullable=True),
        sa.Column("lifted_at", sa.String(length=27), nullable=True),
        sa.Column("restore_status", sa.String(length=16), nullable=True),
        sa.Column("job_id", sa.String(length=40), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("attestation", sa.LargeBinary(), nullable=True),
        sa.Column("revision_id", sa.String(length=40), nullable=True),
        sa.Column("published_at", sa.String(length=27), nullable=True),
        sa.Column("code", sa.String(length=64), nullable=True),
        sa.Column("message", sa.String(length=300), nullable=True),
        sa.ForeignKeyConstraint(["silo_id"], ["silos.silo_id"], name=op.f("fk_deletion_requests_silo_id")),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_deletion_requests")),
        sa.UniqueConstraint("request_id", name=op.f("uq_deletion_requests_request_id")),
    )
    op.create_index(op.f("ix_deletion_requests_silo_id"), "deletion_requests", ["silo_id"], unique=False)
    op.create_index(
        "uq_deletion_requests_one_open",
        "deletion_requests",
        ["silo_id", "subject_hash"],
        unique=True,
        sqlite_where=sa.text("closed_at IS NULL"),
        postgresql_where=sa.text("closed_at IS NULL"),
    )
    op.create_table(
        "federation",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("current_plan_id", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(["current_plan_id"], ["plans.plan_id"], name=op.f("fk_federation_current_plan_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_federation")),
    )
    op.create_table(
        "jobs",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("silo_id", sa.String(length=64), nullable=False),
        sa.Column("plan_id", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=8), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("request_id", sa.String(length=40), nullable=True),
        sa.Column("nonce", sa.String(length=64), nullable=False),
        sa.Column("orders", sa.Integer(), nullable=False),
        sa.Column("issued_at", sa.String(length=27), nullable=True),
        sa.Column("expires_at", sa.String(length=27), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.String(length=27), nullable=False),
        sa.Column("created_by", sa.String(length=200), nullable=False),
        sa.Column("queued_at", sa.String(length=27), nullable=False),
        sa.Column("dispatched_at", sa.String(length=27), nullable=True),
        sa.Column("finished_at", sa.String(length=27), nullable=True),
        sa.Column("code", sa.String(length=64), nullable=True),
        sa.Column("message", sa.String(length=300), nullable=True),
        sa.Column("attestation", sa.LargeBinary(), nullable=True),
        sa.ForeignKeyConstraint(["plan_id"], ["plans.plan_id"], name=op.f("fk_jobs_plan_id")),
        sa.ForeignKeyConstraint(["silo_id"], ["silos.silo_id"], name=op.f("fk_jobs_silo_id")),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_jobs")),
    )
    op.create_index(op.f("ix_jobs_request_id"), "jobs", ["request_id"], unique=False)
    op.create_index(op.f("ix_jobs_silo_id"), "jobs", ["silo_id"], unique=False)
    op.create_index(
        "uq_jobs_one_live_per_silo",
        "jobs",
        ["silo_id"],
        unique=True,
        sqlite_where=sa.text("state IN ('queued', 'dispatched')"),
        postgresql_where=sa.text("state IN ('queued', 'dispatched')"),
    )
    op.create_table(
        "silo_keys",
        sa.Column("kind", sa.String(length=8), nullable=False),
        sa.Column("public_key", sa.String(length=512), nullable=False),
        sa.Column("silo_id", sa.String(length=64), nullable=False),
        sa.Column("added_at", sa.String(length=27), nullable=False),
        sa.Column("retired_at", sa.String(length=27), nullable=True),
        sa.ForeignKeyConstraint(["silo_id"], ["silos.silo_id"], name=op.f("fk_silo_keys_silo_id")),
        sa.PrimaryKeyConstraint("kind", "public_key", name=op.f("pk_silo_keys")),
    )
    op.create_index(op.f("ix_silo_keys_silo_id"), "silo_keys", ["silo_id"], unique=False)
    op.create_table(
        "tombstones",
        sa.Column("silo_id", sa.String(length=64), nullable=False),
        sa.Column("adapter_digest", sa.String(length=80), nullable=False),
        sa.Column("revision_id", sa.String(length=40), nullable=False),
        sa.Column("at", sa.String(length=27), nullable=False),
        sa.ForeignKeyConstraint(["silo_id"], ["silos.silo_id"], name=op.f("fk_tombstones_silo_id")),
        sa.PrimaryKeyConstraint("silo_id", "adapter_digest", name=op.f("pk_tombstones")),
    )
    op.create_table(
        "revisions",
        sa.Column("revision_id", sa.String(length=40), nullable=False),
        sa.Column("silo_id", sa.String(length=64), nullable=False),
        sa.Column("plan_id", sa.String(length=64), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("job_nonce", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("sealed_sha256", sa.String(length=64), nullable=False),
        sa.Column("sealed_bytes", sa.Integer(), nullable=False),
        sa.Column("adapter_digest", sa.String(length=80), nullable=True),
        sa.Column("code", sa.String(length=64), nullable=True),
        sa.Column("message", sa.String(length=300), nullable=True),
        sa.Column("created_at", sa.String(length=27), nullable=False),
        sa.Column("changed_at", sa.String(length=27), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"], name=op.f("fk_revisions_job_id")),
        sa.ForeignKeyConstraint(["plan_id"], ["plans.plan_id"], name=op.f("fk_revisions_plan_id")),
        sa.ForeignKeyConstraint(["silo_id"], ["silos.silo_id"], name=op.f("fk_revisions_silo_id")),
        sa.PrimaryKeyConstraint("revision_id", name=op.f("pk_revisions")),
        sa.UniqueConstraint("job_id", name=op.f("uq_revisions_job_id")),
        sa.UniqueConstraint("silo_id", "revision", name="uq_revisions_number_per_silo"),
    )
    op.create_index(
        "uq_revisions_one_active",
        "revisions",
        ["silo_id", "plan_id"],
        unique=True,
        sqlite_where=sa.text("state = 'active'"),
        postgresql_where=sa.text("state = 'active'"),
    )
    op.create_table(
        "purges",
        sa.Column("revision_id", sa.String(length=40), nullable=False),
        sa.Column("gateway_key_id", sa.String(length=64), nullable=False),
        sa.Column("envelope", sa.LargeBinary(), nullable=False),
        sa.Column("received_at", sa.String(length=27), nullable=False),
        sa.ForeignKeyConstraint(["revision_id"], ["revisions.revision_id"], name=op.f("fk_purges_revision_id")),
        sa.PrimaryKeyConstraint("revision_id", "gateway_key_id", name=op.f("pk_purges")),
    )


def downgrade() -> None:
    op.drop_table("purges")
    op.drop_index(
        "uq_revisions_one_active",
        table_name="revisions",
        sqlite_where=sa.text("state = 'active'"),
        postgresql_where=sa.text("state = 'active'"),
    )
    op.drop_table("revisions")
    op.drop_table("tombstones")
    op.drop_index(op.f("ix_silo_keys_silo_id"), table_name="silo_keys")
    op.drop_table("silo_keys")
    op.drop_index(
        "uq_jobs_one_live_per_silo",
        table_name="jobs",
        sqlite_where=sa.text("state IN ('queued', 'dispatched')"),
        postgresql_where=sa.text("state IN ('queued', 'dispatched')"),
    )
    op.drop_index(op.f("ix_jobs_silo_id"), table_name="jobs")
    op.drop_index(op.f("ix_jobs_request_id"), table_name="jobs")
    op.drop_table("jobs")
    op.drop_table("federation")
    op.drop_index(
        "uq_deletion_requests_one_open",
        table_name="deletion_requests",
        sqlite_where=sa.text("closed_at IS NULL"),
        postgresql_where=sa.text("closed_at IS NULL"),
    )
    op.drop_index(op.f("ix_deletion_requests_silo_id"), table_name="deletion_requests")
    op.drop_table("deletion_requests")
    op.drop_table("silos")
    op.drop_table("receipts")
    op.drop_table("plans")
    op.drop_table("outbox")
    op.drop_index(op.f("ix_enrolments_silo_id"), table_name="enrolments")
    op.drop_table("enrolments")
    op.drop_index(op.f("ix_deletion_events_request_id"), table_name="deletion_events")
    op.drop_table("deletion_events")
