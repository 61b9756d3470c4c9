"""``python -m seqr`` is the ``seqr`` command."""

from seqr.cli import main

main()
