"""Alembic's entry: runs the migrations on the connection that ``coordinator.db`` passes, inside its transaction."""

from alembic import context

from coordinator.db import VERSION_TABLE
from coordinator.models import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
)
context.run_migrations()
