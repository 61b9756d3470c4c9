"""The subcommands of ``seqr coordinator``: those of the operator beside the state, and those over the REST API."""
