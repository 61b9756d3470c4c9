"""The tables. Times are BIGINT microseconds (policy.times); ids are TEXT compared byte by byte on both databases."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, MetaData, String, Text, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

ROLES: Final = ("admin", "privacy_officer", "auditor", "analyst", "silo_owner", "service")
SCOPES: Final = ("chat", "admin", "deletions", "audit", "gateway", "metrics")
SILO_STATUSES: Final = ("active", "quarantined", "suspended")
EFFECTS: Final = ("allow", "deny")

# PostgreSQL's "C" collation orders by bytes as SQLite's BINARY does; linguistic collations order by locale.
Id = Text().with_variant(String(collation="C"), "postgresql")


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


def _one_of(column: str, values: tuple[str, ...]) -> str:
    return f"{column} IN ({', '.join(repr(value) for value in values)})"


def _where(condition: str) -> dict[str, Any]:
    return {"sqlite_where": text(condition), "postgresql_where": text(condition)}


class PolicyState(Base):
    """One row: the policy version, and the head of the audit chain. Writers lock it, so they come one after another."""

    __tablename__ = "policy_state"
    __table_args__ = (CheckConstraint("id = 1", name="single_row"),)

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    version: Mapped[int] = mapped_column(BigInteger)
    audit_seq: Mapped[int] = mapped_column(BigInteger)
    audit_hash: Mapped[str] = mapped_column(Text)


class User(Base):
    __tablename__ = "users"
    __table_args__ = (CheckConstraint(_one_of("status", ("active", "disabled")), name="status"),)

    user_id: Mapped[str] = mapped_column(Id, primary_key=True)
    display_name: Mapped[str] = mapped_column(Text)
    status: Mapped[str] = mapped_column(Text)
    created_at: Mapped[int] = mapped_column(BigInteger)


class UserRole(Base):
    __tablename__ = "user_roles"
    __table_args__ = (CheckConstraint(_one_of("role", ROLES), name="role"),)

    user_id: Mapped[str] = mapped_column(Id, ForeignKey("users.user_id"), primary_key=True)
    role: Mapped[str] = mapped_column(Text, primary_key=True)


class Group(Base):
    __tablename__ = "groups"

    group_id: Mapped[str] = mapped_column(Id, primary_key=True)
    display_name: Mapped[str] = mapped_column(Text)
    created_at: Mapped[int] = mapped_column(BigInteger)


class GroupUser(Base):
    """The user is a direct member of the group."""

    __tablename__ = "group_users"
    __table_args__ = (Index(None, "group_id"),)

    user_id: Mapped[str] = mapped_column(Id, ForeignKey("users.user_id"), primary_key=True)
    group_id: Mapped[str] = mapped_column(Id, ForeignKey("groups.group_id"), primary_key=True)


class GroupGroup(Base):
    """Everybody in the child group is in the parent group too."""

    __tablename__ = "group_groups"
    __table_args__ = (Index(None, "parent_id"), CheckConstraint("child_id <> parent_id", name="not_itself"))

    child_id: Mapped[str] = mapped_column(Id, ForeignKey("groups.group_id"), primary_key=True)
    parent_id: Mapped[str] = mapped_column(Id, ForeignKey("groups.group_id"), primary_key=True)


class Silo(Base):
    """A veto stands apart from the status, so that lifting a quarantine cannot lift the owner's veto."""

    __tablename__ = "silos"
    __table_args__ = (CheckConstraint(_one_of("status", SILO_STATUSES), name="status"),)

    silo_id: Mapped[str] = mapped_column(Id, primary_key=True)
    display_name: Mapped[str] = mapped_column(Text)
    status: Mapped[str] = mapped_column(Text)
    status_reason: Mapped[str] = mapped_column(Text)
    vetoed_by: Mapped[str | None] = mapped_column(Id, ForeignKey("users.user_id"))
    veto_reason: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[int] = mapped_column(BigInteger)


class SiloOwner(Base):
    __tablename__ = "silo_owners"

    silo_id: Mapped[str] = mapped_column(Id, ForeignKey("silos.silo_id"), primary_key=True)
    user_id: Mapped[str] = mapped_column(Id, ForeignKey("users.user_id"), primary_key=True)


class Grant(Base):
    """Counts in [not_before, expires_at) unless revoked; expires_at NULL: no end."""

    __tablename__ = "grants"
    __table_args__ = (
        CheckConstraint(_one_of("effect", EFFECTS), name="effect"),
        CheckConstraint("(user_id IS NULL) <> (group_id IS NULL)", name="one_subject"),
        CheckConstraint("expires_at IS NULL OR expires_at > not_before", name="interval"),
        # Revoked grants stay for the record; decisions do not wade through them.
        Index(None, "user_id", **_where("revoked_at IS NULL")),
        Index(None, "group_id", **_where("revoked_at IS NULL")),
        Index(None, "silo_id"),
    )

    grant_id: Mapped[str] = mapped_column(Id, primary_key=True)
    user_id: Mapped[str | None] = mapped_column(Id, ForeignKey("users.user_id"))
    group_id: Mapped[str | None] = mapped_column(Id, ForeignKey("groups.group_id"))
    silo_id: Mapped[str] = mapped_column(Id, ForeignKey("silos.silo_id"))
    effect: Mapped[str] = mapped_column(Text)
    not_before: Mapped[int] = mapped_column(BigInteger)
    expires_at: Mapped[int | None] = mapped_column(BigInteger)
    reason: Mapped[str] = mapped_column(Text)
    created_by: Mapped[str] = mapped_column(Text)
    created_at: Mapped[int] = mapped_column(BigInteger)
    revoked_at: Mapped[int | None] = mapped_column(BigInteger)


class ApiKey(Base):
    """The key itself is nowhere: `digest` is HMAC-SHA256 of it under the pepper."""

    __tablename__ = "api_keys"
    __table_args__ = (Index(None, "user_id"),)

    key_id: Mapped[str] = mapped_column(Id, primary_key=True)
    prefix: Mapped[str] = mapped_column(Id, unique=True)
    digest: Mapped[str] = mapped_column(Text)
    user_id: Mapped[str] = mapped_column(Id, ForeignKey("users.user_id"))
    scopes: Mapped[str] = mapped_column(Text)
    created_at: Mapped[int] = mapped_column(BigInteger)
    expires_at: Mapped[int | None] = mapped_column(BigInteger)
    revoked_at: Mapped[int | None] = mapped_column(BigInteger)


class UsageLimit(Base):
    """What a gateway admits from `subject`, user:ID or key:ID; NULL leaves a number to the gateway's default."""

    __tablename__ = "usage_limits"

    subject: Mapped[str] = mapped_column(Id, primary_key=True)
    requests_per_minute: Mapped[int | None] = mapped_column(BigInteger)
    tokens_per_minute: Mapped[int | None] = mapped_column(BigInteger)
    tokens_per_day: Mapped[int | None] = mapped_column(BigInteger)
    concurrent_requests: Mapped[int | None] = mapped_column(BigInteger)


class AuditRow(Base):
    """Never updated, never deleted: triggers of the first migration refuse both."""

    __tablename__ = "audit"

    seq: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    at: Mapped[int] = mapped_column(BigInteger)
    actor: Mapped[str] = mapped_column(Text)
    action: Mapped[str] = mapped_column(Text)
    detail: Mapped[str] = mapped_column(Text)
    reason: Mapped[str] = mapped_column(Text)
    policy_version: Mapped[int] = mapped_column(BigInteger)
    prev_hash: Mapped[str] = mapped_column(Text)
    hash: Mapped[str] = mapped_column(Text)
