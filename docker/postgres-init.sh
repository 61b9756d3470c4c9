#!/bin/sh
# Run once by the postgres image, on an empty data volume: policy has a database of its own beside the coordinator's.
set -eu
PGPASSWORD="$(cat "$POSTGRES_PASSWORD_FILE")" createdb --username "$POSTGRES_USER" policy
