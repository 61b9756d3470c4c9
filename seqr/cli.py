"""The ``seqr`` command: one group per role, each found through an entry point so that roles install alone."""

import os
import sys
from importlib.metadata import EntryPoint, entry_points

from seqr.supervisor import follow_supervisor

GROUP = "seqr.commands"
DEBUG = "SEQR_DEBUG"
# Which extra brings the packages of a group, for the sentence printed when they are absent.
EXTRA = {
    "silo": "silo",
    "coordinator": "coordinator",
    "policy": "policy",
    "gateway": "gateway",
    "demo": "all",
    "adapter": "model",
    "bench": "bench",
}


def main(argv: list[str] | None = None) -> None:
    """Run ``seqr <group> ...`` and turn every error with a ``code`` into one sentence and exit status 1."""
    # What this command starts must not import from the working directory: ./coordinator may be somebody's state there.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    args = sys.argv[1:] if argv is None else argv
    groups = {point.name: point for point in entry_points(group=GROUP)}
    if not args or args[0] in {"-h", "--help"}:
        print("usage: seqr {" + ",".join(sorted(groups)) + "} ...\n\nEach group has its own --help.")
        return
    name = args[0]
    if name not in groups:
        _fail("unknown_command", f"there is no command group '{name}'; known groups: {', '.join(sorted(groups))}", 2)
    # Only a command that another one started, as the demo starts services, finds anything to follow.
    follow_supervisor()
    try:
        _run(groups[name], args[1:])
    except BrokenPipeError:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - the reader of our output has gone; say nothing more
        sys.exit(1)
    except KeyboardInterrupt:
        _fail("interrupted", "stopped by the user", 130)
    except ModuleNotFoundError as error:
        extra = EXTRA.get(name, "all")
        _fail(
            "extra_missing",
            f"'seqr {name}' needs the package '{error.name}': in the clone, pip install '.[{extra}]'",
            1,
        )
    except Exception as error:
        code = getattr(error, "code", None)
        if isinstance(code, str):
            _fail(code, str(error), 1)
        if os.environ.get(DEBUG):
            raise
        # What an unforeseen error says may quote a record or a key, and a traceback even more so.
        _fail("internal_error", f"{type(error).__name__}; this is a defect: {DEBUG}=1 shows where, for a report", 1)


def _run(point: EntryPoint, args: list[str]) -> None:
    app = point.load()
    app(args=args, prog_name=f"seqr {point.name}", standalone_mode=True)


def _fail(code: str, message: str, status: int) -> None:
    print(f"error[{code}]: {message}", file=sys.stderr)
    sys.exit(status)
