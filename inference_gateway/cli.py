"""``seqr gateway``: make a gateway's keys, and run it."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help="The data plane: answers from permitted silos.")

Dir = Annotated[Path, typer.Option("--dir", help="The gateway's directory: keys and gateway.toml.")]


@app.command()
def init(
    directory: Dir = Path("."),
    coordinator_url: Annotated[str, typer.Option(help="Where the coordinator answers, as https://host:port.")] = "",
    coordinator_key: Annotated[str, typer.Option(help="The coordinator's public key, base64.")] = "",
    coordinator_ca_file: Annotated[Path | None, typer.Option(help="The CA of the coordinator's certificate.")] = None,
    coordinator_key_file: Annotated[Path | None, typer.Option(help="File with this gateway's API key.")] = None,
    policy_database: Annotated[str, typer.Option(help="The policy database's URL.")] = "",
    policy_pepper_file: Annotated[Path | None, typer.Option(help="The pepper of the policy's API keys.")] = None,
    base_model: Annotated[Path | None, typer.Option(help="Directory of the prepared base model.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8080,
    as_json: Annotated[bool, typer.Option("--json", help="Print the public keys as JSON.")] = False,
) -> None:
    """Make the gateway's keys and its gateway.toml; writes gateway-key.json for `seqr coordinator plan create`."""
    from inference_gateway.setup import initialise

    given: dict[str, Any] = {
        "coordinator_url": coordinator_url,
        "coordinator_public_key": coordinator_key,
        "coordinator_ca_file": coordinator_ca_file,
        "coordinator_key_file": coordinator_key_file,
        "policy_database_url": policy_database,
        "policy_pepper_file": policy_pepper_file,
        "base_model": base_model,
        "host": host,
        "port": port,
    }
    public, path = initialise(directory, {name: value for name, value in given.items() if value not in ("", None)})
    if as_json:
        print(json.dumps({**public, "file": str(path)}))
        return
    print(f"gateway {public['key_id']} is ready in {directory}")
    print(f"give {path} to the coordinator: seqr coordinator plan create --gateway-key {path}")


@app.command()
def serve(
    directory: Dir = Path("."),
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")] = None,
) -> None:
    """Run the gateway until it is interrupted."""
    from inference_gateway.settings import load_settings, require_complete, require_tls

    overrides = {name: value for name, value in {"host": host, "port": port}.items() if value is not None}
    settings = load_settings(directory, **overrides)
    require_complete(settings)
    require_tls(settings)

    # Only now: torch takes seconds to import, and a wrong setting should not.
    from inference_gateway.serving import run

    run(settings)
