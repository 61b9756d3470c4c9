"""The first schema, and the triggers that keep audit rows as they were written."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

ID = sa.Text().with_variant(sa.String(collation="C"), "postgresql")
RUNNING = sa.text("revoked_at IS NULL")
TABLES = (
    "silo_owners", "grants", "user_roles", "silos", "group_users", "group_groups", "api_keys", "users",
    "policy_state", "groups", "audit",
)  # fmt: skip

SQLITE_TRIGGERS = (
    "CREATE TRIGGER audit_no_update BEFORE UPDATE ON audit "
    "BEGIN SELECT RAISE(ABORT, 'audit rows are never changed'); END",
    "CREATE TRIGGER audit_no_delete BEFORE DELETE ON audit "
    "BEGIN SELECT RAISE(ABORT, 'audit rows are never deleted'); END",
    # INSERT OR REPLACE deletes without firing delete triggers (unless recursive_triggers is on).
    "CREATE TRIGGER audit_no_replace BEFORE INSERT ON audit WHEN EXISTS (SELECT 1 FROM audit WHERE seq = NEW.seq) "
    "BEGIN SELECT RAISE(ABORT, 'audit rows are never replaced'); END",
)
POSTGRESQL_TRIGGERS = (
    "CREATE FUNCTION audit_refuse() RETURNS trigger LANGUAGE plpgsql AS "
    "$$ BEGIN RAISE EXCEPTION 'audit rows are never changed or deleted'; END $$",
    "CREATE TRIGGER audit_no_change BEFORE UPDATE OR DELETE ON audit FOR EACH ROW EXECUTE FUNCTION audit_refuse()",
    "CREATE TRIGGER audit_no_truncate BEFORE TRUNCATE ON audit FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse()",
)


def upgrade() -> None:
    op.create_table(
        "audit",
        sa.Column("seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("policy_version", sa.BigInteger(), nullable=False),
        sa.Column("prev_hash", sa.Text(), nullable=False),
        sa.Column("hash", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_audit")),
    )
    op.create_table(
        "groups",
        sa.Column("group_id", ID, nullable=False),
        sa.Column("display_name", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("group_id", name=op.f("pk_groups")),
    )
    op.create_table(
        "policy_state",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("audit_seq", sa.BigInteger(), nullable=False),
        sa.Column("audit_hash", sa.Text(), nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_policy_state_single_row")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_policy_state")),
    )
    op.create_table(
        "users",
        sa.Column("user_id", ID, nullable=False),
        sa.Column("display_name", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("status IN ('active', 'disabled')", name=op.f("ck_users_status")),
        sa.PrimaryKeyConstraint("user_id", name=op.f("pk_users")),
    )
    op.create_table(
        "api_keys",
        sa.Column("key_id", ID, nullable=False),
        sa.Column("prefix", ID, nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("user_id", ID, nullable=False),
        sa.Column("scopes", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=True),
        sa.Column("revoked_at", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["user_id"], ["users.user_id"], name=op.f("fk_api_keys_user_id")),
        sa.PrimaryKeyConstraint("key_id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("prefix", name=op.f("uq_api_keys_prefix")),
    )
    op.create_index("ix_api_keys_user_id", "api_keys", ["user_id"])

    op.create_table(
        "group_groups",
        sa.Column("child_id", ID, nullable=False),
        sa.Column("parent_id", ID, nullable=False),
        sa.CheckConstraint("child_id <> parent_id", name=op.f("ck_group_groups_not_itself")),
        sa.ForeignKeyConstraint(["child_id"], ["groups.group_id"], name=op.f("fk_group_groups_child_id")),
        sa.ForeignKeyConstraint(["parent_id"], ["groups.group_id"], name=op.f("fk_group_groups_parent_id")),
        sa.PrimaryKeyConstraint("child_id", "parent_id", name=op.f("pk_group_groups")),
    )
    op.create_index("ix_group_groups_parent_id", "group_groups", ["parent_id"])

    op.create_table(
        "group_users",
        sa.Column("user_id", ID, nullable=False),
        sa.Column("group_id", ID, nullable=False),
        sa.ForeignKeyConstraint(["group_id"], ["groups.group_id"], name=op.f("fk_group_users_group_id")),
        sa.ForeignKeyConstraint(["user_id"], ["users.user_id"], name=op.f("fk_group_users_user_id")),
        sa.PrimaryKeyConstraint("user_id", "group_id", name=op.f("pk_group_users")),
    )
    op.create_index("ix_group_users_group_id", "group_users", ["group_id"])

    op.create_table(
        "silos",
        sa.Column("silo_id", ID, nullable=False),
        sa.Column("display_name", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("status_reason", sa.Text(), nullable=False),
        sa.Column("vetoed_by", ID, nullable=True),
        sa.Column("veto_reason", sa.Text(), nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("status IN ('active', 'quarantined', 'suspended')", name=op.f("ck_silos_status")),
        sa.ForeignKeyConstraint(["vetoed_by"], ["users.user_id"], name=op.f("fk_silos_vetoed_by")),
        sa.PrimaryKeyConstraint("silo_id", name=op.f("pk_silos")),
    )
    op.create_table(
        "user_roles",
        sa.Column("user_id", ID, nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.CheckConstraint(
            "role IN ('admin', 'privacy_officer', 'auditor', 'analyst', 'silo_owner', 'service')",
            name=op.f("ck_user_roles_role"),
        ),
        sa.ForeignKeyConstraint(["user_id"], ["users.user_id"], name=op.f("fk_user_roles_user_id")),
        sa.PrimaryKeyConstraint("user_id", "role", name=op.f("pk_user_roles")),
    )
    op.create_table(
        "grants",
        sa.Column("grant_id", ID, nullable=False),
        sa.Column("user_id", ID, nullable=True),
        sa.Column("group_id", ID, nullable=True),
        sa.Column("silo_id", ID, nullable=False),
        sa.Column("effect", sa.Text(), nullable=False),
        sa.Column("not_before", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created_by", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("revoked_at", sa.BigInteger(), nullable=True),
        sa.CheckConstraint("effect IN ('allow', 'deny')", name=op.f("ck_grants_effect")),
        sa.CheckConstraint("(user_id IS NULL) <> (group_id IS NULL)", name=op.f("ck_grants_one_subject")),
        sa.CheckConstraint("expires_at IS NULL OR expires_at > not_before", name=op.f("ck_grants_interval")),
        sa.ForeignKeyConstraint(["group_id"], ["groups.group_id"], name=op.f("fk_grants_group_id")),
        sa.ForeignKeyConstraint(["silo_id"], ["silos.silo_id"], name=op.f("fk_grants_silo_id")),
        sa.ForeignKeyConstraint(["user_id"], ["users.user_id"], name=op.f("fk_grants_user_id")),
        sa.PrimaryKeyConstraint("grant_id", name=op.f("pk_grants")),
    )
    op.create_index("ix_grants_group_id", "grants", ["group_id"], sqlite_where=RUNNING, postgresql_where=RUNNING)
    op.create_index("ix_grants_silo_id", "grants", ["silo_id"])
    op.create_index("ix_grants_user_id", "grants", ["user_id"], sqlite_where=RUNNING, postgresql_where=RUNNING)

    op.create_table(
        "silo_owners",
        sa.Column("silo_id", ID, nullable=False),
        sa.Column("user_id", ID, nullable=False),
        sa.ForeignKeyConstraint(["silo_id"], ["silos.silo_id"], name=op.f("fk_silo_owners_silo_id")),
        sa.ForeignKeyConstraint(["user_id"], ["users.user_id"], name=op.f("fk_silo_owners_user_id")),
        sa.PrimaryKeyConstraint("silo_id", "user_id", name=op.f("pk_silo_owners")),
    )
    genesis = "0" * 64
    op.execute(f"INSERT INTO policy_state (id, version, audit_seq, audit_hash) VALUES (1, 0, 0, '{genesis}')")
    postgresql = op.get_bind().dialect.name == "postgresql"
    for statement in POSTGRESQL_TRIGGERS if postgresql else SQLITE_TRIGGERS:
        op.execute(statement)


def downgrade() -> None:
    for table in TABLES:
        op.drop_table(table)
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION audit_refuse()")
