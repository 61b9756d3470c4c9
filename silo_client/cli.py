"""``seqr silo``: what a data owner does. Torch and transformers are loaded only by the commands that need them."""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from seqr.keys import VerifyKey
from silo_client.config import SiloConfig, load_config
from silo_client.quiet import quiet

if TYPE_CHECKING:
    from seqr.plan import Plan

app = typer.Typer(
    help="Train beside your own data, and see what leaves.", no_args_is_help=True, pretty_exceptions_enable=False
)
out = Console(soft_wrap=True, highlight=False)

Directory = Annotated[Path, typer.Option("--dir", help="The silo directory, with silo.toml in it.")]
PlanFile = Annotated[Path | None, typer.Option("--plan", help="A signed plan; default: the one received last.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave bad rows out and report them, instead of stopping.")]

SHOWN_PROBLEMS = 50


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where the silo's settings and keys will lie.")],
    silo_id: Annotated[str, typer.Option(help="The silo's id in the federation.")],
    coordinator_key: Annotated[str, typer.Option(help="The coordinator's public key (base64): the only one trusted.")],
    base_model: Annotated[str, typer.Option(help="A model directory, a GGUF file, or hub:OWNER/NAME.")],
    data: Annotated[list[Path], typer.Option(help="A .jsonl or .csv file of records; may be given several times.")],
    display_name: Annotated[str, typer.Option(help="The owner's name, as people should see it.")] = "",
    coordinator_url: Annotated[str, typer.Option(help="https://… of the coordinator.")] = "",
    superlink: Annotated[str, typer.Option(help="host:port that brings the jobs.")] = "",
    ca_file: Annotated[Path | None, typer.Option(help="CA certificate of both, when it is not a public one.")] = None,
    prompt_column: Annotated[str | None, typer.Option(help="Default: prompt.")] = None,
    completion_column: Annotated[str | None, typer.Option(help="Default: completion.")] = None,
    subject_column: Annotated[
        str | None, typer.Option(help="Whose record a row is. Default: subject, where there is such a column.")
    ] = None,
    key_column: Annotated[
        str | None, typer.Option(help="A record's own key. Default: key, where there is one; else its content.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of training. Default: all of this machine.")
    ] = None,
) -> None:
    """Make a silo: settings, keys and salt. Sends nothing."""
    from silo_client.config import CONFIG_NAME
    from silo_client.errors import NO_SUBJECT_COLUMN
    from silo_client.setup import initialise, portable
    from silo_client.state import State

    authority = None if ca_file is None else portable(directory, ca_file)
    config = initialise(
        directory,
        {
            "silo_id": silo_id,
            "display_name": display_name or silo_id,
            "base_model": base_model,
            "share_counts": False,
            "skip_bad": False,
            "threads": threads or os.cpu_count() or 1,
            "coordinator": {"url": coordinator_url, "public_key": coordinator_key, "ca_file": authority},
            "superlink": {"address": superlink, "ca_file": authority},
        },
        data,
        {
            "prompt_column": prompt_column,
            "completion_column": completion_column,
            "subject_column": subject_column,
            "key_column": key_column,
        },
    )
    out.print(f"silo {config.silo_id} is set up in {directory}; its settings are in {directory / CONFIG_NAME}")
    out.print(f"fingerprint: {State.open(config).signing_key().public.fingerprint}", markup=False)
    if not any(source.subject_column for source in config.data):
        out.print(NO_SUBJECT_COLUMN, markup=False)
    out.print(f"next: seqr silo check --dir {directory}, then seqr silo enrol --dir {directory}")


@app.command()
def check(
    directory: Directory = Path("."),
    plan: PlanFile = None,
    online: Annotated[bool, typer.Option(help="Also ask whether the coordinator answers.")] = False,
) -> None:
    """Look for everything that would stop a training; changes nothing."""
    quiet()
    from silo_client.check import examine

    config = load_config(directory)
    fatal = shown = hidden = 0
    for finding in examine(config, _plan_from(plan, config)[0], online=online):
        fatal += finding.fatal
        if finding.code and shown >= SHOWN_PROBLEMS:
            hidden += 1
            continue
        shown += bool(finding.code)
        mark = "problem" if finding.fatal else "skipped" if finding.code else "note" if finding.note else "ok"
        out.print(f"{mark:<8}{finding.what}" + (f" [{finding.code}]" if finding.code else ""), markup=False)
    if hidden:
        out.print(f"        … and {hidden} more")
    if fatal:
        out.print(f"{fatal} {'problem' if fatal == 1 else 'problems'} to solve before this silo can train")
        raise typer.Exit(1)
    out.print("this silo can train")


@app.command()
def enrol(directory: Directory = Path(".")) -> None:
    """Ask the coordinator to let this silo in; an admin approves it by its fingerprint."""
    from silo_client import enrol as enrolment
    from silo_client.state import State

    config = load_config(directory)
    fingerprint = enrolment.enrol(config, State.open(config))
    out.print(f"silo {config.silo_id} has asked to join and waits for an admin's approval")
    out.print(f"read this fingerprint to the admin: {fingerprint}", markup=False)


@app.command()
def train(directory: Directory = Path("."), plan: PlanFile = None, skip_bad: SkipBad = False) -> None:
    """Train this silo's adapter here and keep it for the next job; sends nothing."""
    quiet()
    from silo_client.adapters import obtain_adapter
    from silo_client.progress import training_bar
    from silo_client.state import State

    config = _with_skip_bad(load_config(directory), skip_bad)
    state = State.open(config)
    with state.lock():
        agreed, envelope = _plan_from(plan, config)
        if agreed is None:
            agreed = state.latest_plan(VerifyKey.from_b64(config.coordinator.public_key))
        else:
            state.save_plan(agreed, envelope)
        with training_bar(out) as progress:
            trained = obtain_adapter(config, state, agreed, progress=progress, tell=_say)
    how = "taken from the cache, since records and plan are unchanged" if trained.reused else "trained"
    out.print(f"adapter {trained.adapter.digest[:16]}… of plan {agreed.plan_id}: {how}", markup=False)
    out.print(f"{trained.records} records, {trained.tokens} tokens; nothing was sent")


@app.command()
def run(directory: Directory = Path(".")) -> None:
    """Stay connected and carry out the coordinator's jobs, until stopped."""
    from silo_client import node

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    node.run(load_config(directory), tell=_say)


@app.command()
def status(
    directory: Directory = Path("."),
    what_leaves: Annotated[bool, typer.Option(help="List everything that leaves this silo, piece by piece.")] = False,
) -> None:
    """Show what this silo has trained, sent and erased."""
    quiet()
    from silo_client import report
    from silo_client.state import State

    config = load_config(directory)
    state = State.open(config)
    for line in report.what_leaves(config, state) if what_leaves else report.status(config, state):
        out.print(line, markup=False)


@app.command()
def forget(
    subject: Annotated[str, typer.Option(help="Whose records to erase, as the subject column names them.")],
    directory: Directory = Path("."),
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
) -> None:
    """Erase a subject: its rows from the data files, and all that was trained with them from this machine."""
    quiet()
    from silo_client.forget import count, forget_subject
    from silo_client.state import State

    config = load_config(directory)
    state = State.open(config)
    with state.lock():
        if not yes:
            rows = count(config, subject)
            typer.confirm(f"Erase {rows} rows from the data files, and every adapter trained so far?", abort=True)
        removed = forget_subject(config, state, subject)
    gone = "1 record is gone" if removed == 1 else f"{removed} records are gone"
    out.print(f"{gone} from the data files, and so is every adapter and checkpoint made with them")
    out.print("a gateway still holds the adapter sent last, if any: ask the coordinator for a deletion or a training")


def _say(sentence: str) -> None:
    out.print(sentence, markup=False)


def _with_skip_bad(config: SiloConfig, skip_bad: bool) -> SiloConfig:
    return config.model_copy(update={"skip_bad": True}) if skip_bad else config


def _plan_from(path: Path | None, config: SiloConfig) -> "tuple[Plan | None, bytes]":
    """The verified plan of a file and the file's bytes; no plan where no file was named."""
    from seqr.dsse import Envelope
    from seqr.plan import verify_plan
    from silo_client.errors import PlanMissing

    if path is None:
        return None, b""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise PlanMissing(f"the plan {path} cannot be read: {error.strerror}") from None
    return verify_plan(Envelope.from_json(raw), VerifyKey.from_b64(config.coordinator.public_key)), raw
