"""``seqr bench``: the papers' experiments, and what routing and the gateway cost."""

import typer

from seqr.bench.gateway.command import gateway
from seqr.bench.paper.command import paper
from seqr.bench.routing.command import routing

app = typer.Typer(no_args_is_help=True, help="Reproduce the papers' experiments and measure routing.")
app.command()(gateway)
app.command()(paper)
app.command()(routing)
