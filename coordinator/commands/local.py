"""Commands of the operator, on the machine that holds the coordinator's state."""

import json
from pathlib import Path
from typing import Annotated

import typer
from click import Choice
from click.core import ParameterSource

from coordinator.commands.client import AsJson
from seqr.plan import ROUTINGS

Directory = Annotated[
    Path, typer.Option("--dir", envvar="SEQR_COORDINATOR_DIRECTORY", help="The coordinator's state directory.")
]
OptionalFile = Annotated[Path | None, typer.Option()]
HERE = Path(".")

plan_app = typer.Typer(no_args_is_help=True, help="Create and show plans.")


def init(
    context: typer.Context,
    directory: Directory = HERE,
    federation: Annotated[str, typer.Option(help="Name of the federation, written into its plans.")] = "seqr",
    database_url: Annotated[str, typer.Option(help="Default: a SQLite file in the state directory.")] = "",
    policy_database: Annotated[str, typer.Option(help="URL of the policy database (`seqr policy init`).")] = "",
    policy_pepper_file: OptionalFile = None,
    host: Annotated[str, typer.Option(help="Address on which the REST API listens.")] = "127.0.0.1",
    port: int = 8443,
    superlink_host: Annotated[str, typer.Option(help="Address on which the silos' port listens.")] = "127.0.0.1",
    superlink_port: int = 8000,
    as_json: AsJson = False,
) -> None:
    """Make the state directory: keys, settings, database. Prints the public key that silos have to pin.

    A directory that holds a coordinator already keeps its keys and settings; its database is brought to the newest
    schema.
    """
    from coordinator.db import upgrade
    from coordinator.errors import StateDirExists
    from coordinator.settings import load_settings, make_settings
    from coordinator.setup import init_state
    from seqr.keys import VerifyKey

    values: dict[str, str | int | bool] = {"federation": federation, "host": host, "port": port}
    values |= {"superlink_host": superlink_host, "superlink_port": superlink_port}
    if database_url:
        values["database_url"] = database_url
    if policy_database:
        values["policy_database_url"] = policy_database
    if policy_pepper_file is not None:
        values["policy_pepper_file"] = str(policy_pepper_file.expanduser().absolute())
    settings = make_settings(directory=directory, **values)
    if settings.signing_key_file.exists():
        if given := _options_given(context) - {"directory", "as_json"}:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(given))
            raise StateDirExists(
                f"{settings.directory} holds a coordinator already and {options} would change nothing; edit "
                f"{settings.config_file} instead"
            )
        settings = load_settings(directory)
        upgrade(settings.database_url)
        public = VerifyKey.load(settings.public_key_file)
    else:
        public = init_state(settings, values)
    told = {"directory": str(settings.directory), "public_key": public.to_b64(), "fingerprint": public.fingerprint}
    if as_json:
        typer.echo(json.dumps(told, indent=2))
    else:
        typer.echo(f"coordinator in {told['directory']}")
        typer.echo(f"public key   {told['public_key']}   ({told['fingerprint']})")


def certs(
    directory: Directory = HERE,
    name: Annotated[
        list[str] | None, typer.Option(help="DNS name or address the certificate is for; may be repeated.")
    ] = None,
    server: Annotated[str, typer.Option(help="Name of the files: <server>.crt and <server>.key.")] = "server",
) -> None:
    """Make a CA and a server certificate in <dir>/certs, and use it for the API and the SuperLink's door."""
    from coordinator.certs import LOOPBACK_NAMES, make_certificates
    from coordinator.settings import load_settings
    from coordinator.setup import use_certificate

    settings = load_settings(directory)
    make_certificates(settings.certificates, tuple(name or LOOPBACK_NAMES), server)
    if server == "server":
        use_certificate(settings)
    typer.echo(f"CA certificate for clients and silos: {settings.certificates / 'ca.crt'}")


def serve(
    directory: Directory = HERE,
    host: Annotated[str | None, typer.Option()] = None,
    port: Annotated[int | None, typer.Option()] = None,
    ssl_certfile: OptionalFile = None,
    ssl_keyfile: OptionalFile = None,
) -> None:
    """Serve the REST API and carry deletions forward."""
    from coordinator.serve import serve as run
    from coordinator.settings import load_settings

    given = {"host": host, "port": port, "ssl_certfile": _absolute(ssl_certfile), "ssl_keyfile": _absolute(ssl_keyfile)}
    run(load_settings(directory, **{name: value for name, value in given.items() if value is not None}))


def flower(directory: Directory = HERE) -> None:
    """Start Flower's SuperLink, SuperExec and the resident ServerApp, and keep them alive."""
    from coordinator.core import open_coordinator
    from coordinator.flower import FlowerLauncher
    from coordinator.logs import configure_logging
    from coordinator.settings import load_settings
    from coordinator.silos import approved_nodes
    from seqr.supervisor import follow_supervisor

    settings = load_settings(directory)
    configure_logging()
    coordinator = open_coordinator(settings)
    follow_supervisor()
    FlowerLauncher(settings, lambda: approved_nodes(coordinator.engine)).run()


def up(directory: Directory = HERE) -> None:
    """Run `serve` and `flower` together on this machine, and keep both alive."""
    from coordinator.core import open_coordinator
    from coordinator.logs import configure_logging
    from coordinator.serve import require_tls
    from coordinator.settings import load_settings
    from coordinator.up import run

    settings = load_settings(directory)
    require_tls(settings)
    configure_logging()
    open_coordinator(settings).close()
    run(settings)


@plan_app.command("create")
def create_plan(
    base_model: Annotated[Path, typer.Option(help="Directory of the base model, as save_pretrained writes it.")],
    gateway_key: Annotated[list[Path], typer.Option(help="gateway-key.json of `seqr gateway init`; may be repeated.")],
    directory: Directory = HERE,
    name: Annotated[str, typer.Option(help="What to call the base model (default: its folder's name).")] = "",
    targets: Annotated[
        str, typer.Option(help="Which Linears are adapted.", click_type=Choice(["attention", "all"]))
    ] = "all",
    rank: Annotated[int, typer.Option(help="Rank of every adapter.")] = 16,
    alpha: Annotated[float | None, typer.Option(help="LoRA's alpha (default: twice the rank).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the shared A (default: drawn).")] = None,
    dtype: Annotated[
        str, typer.Option(help="In training and serving alike.", click_type=Choice(["float32", "bfloat16"]))
    ] = "float32",
    routing: Annotated[str, typer.Option(help="Default router.", click_type=Choice(list(ROUTINGS)))] = ROUTINGS[0],
    calibration: Annotated[
        str, typer.Option(help="Whose mu and sigma route.", click_type=Choice(["public", "own"]))
    ] = "public",
    max_steps: Annotated[int, typer.Option(help="Training steps of every silo.")] = 40,
    batch_size: Annotated[int, typer.Option(help="Records a step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate, reached after the warm-up.")] = 2e-3,
    max_length: Annotated[
        int, typer.Option(help="Tokens of a record, chat frame included; longer ones are refused.")
    ] = 256,
    warmup_steps: Annotated[int, typer.Option(help="Steps until the highest learning rate.")] = 4,
    as_json: AsJson = False,
) -> None:
    """Sign a new plan, store it and make it the current one."""
    from coordinator.commands.planning import PlanOptions, make_plan
    from coordinator.settings import load_settings
    from seqr.plan import TrainingLimits

    training = TrainingLimits(max_steps, batch_size, learning_rate, max_length, warmup_steps)
    options = PlanOptions(
        base_model, gateway_key, name, targets, rank, alpha, seed, dtype, routing, calibration, training
    )
    plan = make_plan(load_settings(directory), options)
    told = {"plan_id": plan.plan_id, "base_model": plan.base_model, "modules": len(plan.modules), "rank": plan.rank}
    typer.echo(json.dumps(told) if as_json else f"{plan.plan_id}: {plan.base_model}, {len(plan.modules)} Linears")


@plan_app.command("show")
def show_plan(
    directory: Directory = HERE,
    plan_id: Annotated[str | None, typer.Argument(help="Default: the current plan.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the signed envelope to this file.")] = None,
) -> None:
    """Print a plan, or write its signed envelope for `seqr silo train --plan`."""
    from coordinator.commands.planning import load_plan
    from coordinator.settings import load_settings

    envelope, plan = load_plan(load_settings(directory), plan_id)
    if out is not None:
        out.write_bytes(envelope)
    else:
        typer.echo(json.dumps(plan.to_dict(), indent=2))


def _options_given(context: typer.Context) -> set[str]:
    return {name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.expanduser().absolute()
