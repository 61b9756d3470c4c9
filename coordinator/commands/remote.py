"""Commands of admins and privacy officers, who need an API key and no access to the machine."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from click import Choice

from coordinator.commands.client import DEFAULT_URL, AsJson, CaFile, KeyFile, Remote, Url, show
from coordinator.errors import RemoteProblem

Reason = Annotated[str, typer.Option(help="Why; kept in the audit log.")]
KEY = Path("seqr.key")
FINAL = frozenset({"succeeded", "failed", "cancelled"})

deletion_app = typer.Typer(no_args_is_help=True, help="File and follow deletion requests.")
_REQUEST = ("request_id", "silo_id", "state", "received_at", "due_at", "duplicate_of", "code", "message")


def silos(url: Url = DEFAULT_URL, key_file: KeyFile = KEY, ca_file: CaFile = None, as_json: AsJson = False) -> None:
    """List silos, and those that ask to join."""
    found = Remote(url, key_file, ca_file).call("GET", "/v1/silos")
    show(found, as_json, ("silo_id", "display_name", "status", "fingerprints", "since"))


def approve(
    silo_id: str,
    fingerprint: Annotated[str, typer.Option(help="As the owner read it out from `seqr silo enrol`.")],
    reason: Reason = "the owner read out the fingerprint",
    url: Url = DEFAULT_URL,
    key_file: KeyFile = KEY,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Let a silo in, after comparing its fingerprint with what the owner reads out."""
    body = {"fingerprint": fingerprint, "reason": reason}
    done = Remote(url, key_file, ca_file).call("POST", f"/v1/silos/{silo_id}/approve", body)
    show(done, as_json, ("silo_id", "status", "node_registered", "why"))


def reject(
    silo_id: str, reason: Reason, url: Url = DEFAULT_URL, key_file: KeyFile = KEY, ca_file: CaFile = None
) -> None:
    """Refuse a silo's request to join."""
    Remote(url, key_file, ca_file).call("POST", f"/v1/silos/{silo_id}/reject", {"reason": reason})
    typer.echo(f"{silo_id}: rejected")


def suspend(
    silo_id: str, reason: Reason, url: Url = DEFAULT_URL, key_file: KeyFile = KEY, ca_file: CaFile = None
) -> None:
    """Shut a silo out: nobody may use it, and it is disconnected."""
    Remote(url, key_file, ca_file).call("POST", f"/v1/silos/{silo_id}/suspend", {"reason": reason})
    typer.echo(f"{silo_id}: suspended")


def job(
    silo_id: str,
    kind: Annotated[str, typer.Option(help="What to do.", click_type=Choice(["train", "ping"]))] = "train",
    reason: Reason = "asked for by an admin",
    wait: Annotated[bool, typer.Option("--wait", help="Return when the job is over.")] = False,
    url: Url = DEFAULT_URL,
    key_file: KeyFile = KEY,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Give a silo a job; it gets it as soon as it is connected."""
    remote = Remote(url, key_file, ca_file)
    made = remote.call("POST", "/v1/jobs", {"silo_id": silo_id, "kind": kind, "reason": reason})
    while wait and made["state"] not in FINAL:
        time.sleep(0.5)
        made = remote.call("GET", f"/v1/jobs/{made['job_id']}")
    show(made, as_json, ("job_id", "silo_id", "kind", "state", "code", "message"))
    if wait and made["state"] != "succeeded":
        raise RemoteProblem(made["code"] or "job_cancelled", f"job {made['job_id']} {made['state']}: {made['message']}")


def jobs(
    silo_id: Annotated[str | None, typer.Argument()] = None,
    url: Url = DEFAULT_URL,
    key_file: KeyFile = KEY,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """List the latest jobs."""
    found = Remote(url, key_file, ca_file).call("GET", "/v1/jobs", silo_id=silo_id)
    show(found, as_json, ("job_id", "silo_id", "kind", "state", "created_at", "code"))


def cancel(
    job_id: str,
    reason: Reason,
    url: Url = DEFAULT_URL,
    key_file: KeyFile = KEY,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Give up a job that is not over; a reply that still comes is dropped."""
    done = Remote(url, key_file, ca_file).call("POST", f"/v1/jobs/{job_id}/cancel", {"reason": reason})
    show(done, as_json, ("job_id", "silo_id", "kind", "state", "message"))


def revisions(
    silo_id: Annotated[str | None, typer.Argument()] = None,
    url: Url = DEFAULT_URL,
    key_file: KeyFile = KEY,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """List the latest revisions."""
    found = Remote(url, key_file, ca_file).call("GET", "/v1/revisions", silo_id=silo_id)
    show(found, as_json, ("revision_id", "silo_id", "revision", "state", "created_at", "code"))


@deletion_app.command("file")
def file(
    silo_id: str,
    reason: Reason,
    subject: Annotated[
        str | None, typer.Option(help="As in the silo's subject column; asked for when left out, which is safer.")
    ] = None,
    requested_by: Annotated[str, typer.Option(help="Who asked; forgotten when the request is closed.")] = "",
    url: Url = DEFAULT_URL,
    key_file: KeyFile = KEY,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """File a deletion request; the silo is out of routing when this returns."""
    # A subject on the command line stays in the shell's history and is seen by everybody on the machine.
    named = subject if subject is not None else typer.prompt("subject", hide_input=True)
    body = {"silo_id": silo_id, "subject": named, "requested_by": requested_by, "reason": reason}
    show(Remote(url, key_file, ca_file).call("POST", "/v1/deletion-requests", body), as_json, _REQUEST)


@deletion_app.command("list")
def requests(
    silo_id: Annotated[str | None, typer.Argument()] = None,
    url: Url = DEFAULT_URL,
    key_file: KeyFile = KEY,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """List the latest deletion requests."""
    found = Remote(url, key_file, ca_file).call("GET", "/v1/deletion-requests", silo_id=silo_id)
    show(found, as_json, ("request_id", "silo_id", "state", "due_at", "code"))


@deletion_app.command("show")
def show_request(
    request_id: str, url: Url = DEFAULT_URL, key_file: KeyFile = KEY, ca_file: CaFile = None, as_json: AsJson = False
) -> None:
    """Show a request and every state it has been in."""
    found = Remote(url, key_file, ca_file).call("GET", f"/v1/deletion-requests/{request_id}")
    show(found, as_json, _REQUEST)
    if not as_json:
        for line in found["history"]:
            typer.echo(f"  {line['at']}  {line['to_state']:<17} {line['actor']}  {_said(line['detail'])}")


@deletion_app.command("retry")
def retry(
    request_id: str, reason: Reason, url: Url = DEFAULT_URL, key_file: KeyFile = KEY, ca_file: CaFile = None
) -> None:
    """Give a failed request to the silo once more."""
    found = Remote(url, key_file, ca_file).call("POST", f"/v1/deletion-requests/{request_id}/retry", {"reason": reason})
    show(found, False, _REQUEST)


@deletion_app.command("withdraw")
def withdraw(
    request_id: str, reason: Reason, url: Url = DEFAULT_URL, key_file: KeyFile = KEY, ca_file: CaFile = None
) -> None:
    """End a request that no silo has been told of yet."""
    path = f"/v1/deletion-requests/{request_id}/withdraw"
    show(Remote(url, key_file, ca_file).call("POST", path, {"reason": reason}), False, _REQUEST)


@deletion_app.command("receipt")
def receipt(
    request_id: str,
    out: Annotated[Path | None, typer.Option(help="Default: receipt-<request id>.json")] = None,
    url: Url = DEFAULT_URL,
    key_file: KeyFile = KEY,
    ca_file: CaFile = None,
) -> None:
    """Download the signed receipt; `seqr receipt verify` checks it."""
    envelope = Remote(url, key_file, ca_file).fetch("GET", f"/v1/deletion-requests/{request_id}/receipt")
    path = out or Path(f"receipt-{request_id}.json")
    path.write_bytes(envelope)
    typer.echo(str(path))


def _said(detail: dict[str, Any]) -> str:
    return json.dumps(detail, ensure_ascii=False) if detail else ""
