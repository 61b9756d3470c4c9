"""Alembic's entry point. The connection comes from policy.db.migrate, which owns the transaction."""

from alembic import context

from policy.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,
)
context.run_migrations()
