"""``python -m seqr.bench.routing``: the command without the rest of the command line."""

import sys

import typer

from seqr.bench.routing.command import routing
from seqr.errors import SeqrError

app = typer.Typer(add_completion=False)
app.command()(routing)


def main() -> None:
    """Run the command; a user's error is one sentence and status 1."""
    try:
        app()
    except SeqrError as error:
        print(f"error[{error.code}]: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
