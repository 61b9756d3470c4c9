"""``seqr receipt``: check or read the receipt of a deletion, with public keys alone."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from seqr.dsse import Envelope
from seqr.errors import SeqrError
from seqr.keys import VerifyKey
from seqr.receipt import MAX_RECEIPT_FILE_BYTES, Receipt, ReceiptReport, read_unverified, verify_receipt

app = typer.Typer(no_args_is_help=True, help="Check the signed receipt of a deletion.")

KeyFiles = list[Path]


class ReceiptFileMissing(SeqrError):
    """A receipt file that cannot be read."""

    code = "receipt_file_missing"


@app.command()
def verify(
    receipt: Annotated[Path, typer.Argument(help="The receipt, as downloaded from the coordinator.")],
    coordinator_key: Annotated[Path, typer.Option(help="File with the coordinator's public key (base64).")],
    silo_key: Annotated[KeyFiles, typer.Option(help="File with a public key of the silo; may be repeated.")],
    gateway_key: Annotated[KeyFiles, typer.Option(help="A gateway's public key or gateway-key.json; may be repeated.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Check every signature in RECEIPT and that all parts speak of the same deletion."""
    report = verify_receipt(
        _load(receipt),
        VerifyKey.load(coordinator_key),
        [VerifyKey.load(path) for path in silo_key],
        [_gateway_key(path) for path in gateway_key],
    )
    if as_json:
        typer.echo(json.dumps(_result(report), indent=2))
        return
    typer.echo("The receipt is valid. Verified:")
    for line in report.verified:
        typer.echo(f"  + {line}")
    typer.echo("It does not prove:")
    for line in report.receipt.does_not_prove:
        typer.echo(f"  - {line}")


@app.command()
def show(receipt: Annotated[Path, typer.Argument(help="The receipt, as downloaded from the coordinator.")]) -> None:
    """Print what RECEIPT says, without checking any signature."""
    typer.echo("NOT VERIFIED; use 'seqr receipt verify' to check the signatures", err=True)
    typer.echo(json.dumps(_readable(read_unverified(_load(receipt))), indent=2, ensure_ascii=False))


def _load(path: Path) -> Envelope:
    try:
        with path.open("rb") as file:
            return Envelope.from_json(file.read(MAX_RECEIPT_FILE_BYTES + 1), MAX_RECEIPT_FILE_BYTES)
    except OSError as error:
        raise ReceiptFileMissing(f"the receipt {path} cannot be read: {error.strerror}") from None


def _gateway_key(path: Path) -> VerifyKey:
    """A bare key file, or the JSON that ``seqr gateway init`` writes."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return VerifyKey.load(path)
    if isinstance(document, dict) and isinstance(document.get("signing_key"), str):
        return VerifyKey.from_b64(document["signing_key"])
    return VerifyKey.load(path)


def _result(report: ReceiptReport) -> dict[str, Any]:
    return {
        "valid": True,
        "verified": list(report.verified),
        "does_not_prove": list(report.receipt.does_not_prove),
        "receipt": _readable(report.receipt),
    }


def _readable(receipt: Receipt) -> dict[str, Any]:
    """The receipt with its embedded statements decoded."""
    document = receipt.to_dict()
    document["erasure"] = _decoded(receipt.erasure)
    document["purges"] = [_decoded(purge) for purge in receipt.purges]
    return document


def _decoded(envelope: Envelope) -> Any:
    try:
        return {"statement": json.loads(envelope.payload), "signed_by": [s.key_id for s in envelope.signatures]}
    except ValueError:
        return envelope.to_dict()
