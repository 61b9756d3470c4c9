"""seqr coordinator: commands for the operator, beside the state, and for admins and officers, over the REST API."""

import typer

from coordinator.commands import local, remote

app = typer.Typer(no_args_is_help=True, help="The control plane: silos, plans, jobs, revisions and deletions.")
app.command("init")(local.init)
app.command("certs")(local.certs)
app.add_typer(local.plan_app, name="plan")
app.command("serve")(local.serve)
app.command("flower")(local.flower)
app.command("up")(local.up)
app.command("silos")(remote.silos)
app.command("approve")(remote.approve)
app.command("reject")(remote.reject)
app.command("suspend")(remote.suspend)
app.command("job")(remote.job)
app.command("jobs")(remote.jobs)
app.command("cancel")(remote.cancel)
app.command("revisions")(remote.revisions)
app.add_typer(remote.deletion_app, name="deletion")
