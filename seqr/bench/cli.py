"""``seqr bench``: the papers' experiments, and what routing costs."""

import typer

from seqr.bench.paper.command import paper
from seqr.bench.routing.command import routing

app = typer.Typer(no_args_is_help=True, help="Reproduce the papers' experiments and measure routing.")
app.command()(paper)
app.command()(routing)
