"""``seqr adapter``: any peft LoRA checkpoint as A, Q and R, and back, without plan, silo or coordinator."""

from pathlib import Path
from typing import Annotated

import typer

from seqr.errors import SeqrError

app = typer.Typer(no_args_is_help=True, help="Turn peft LoRA checkpoints into factored adapters and back.")


class AdapterFileUnusable(SeqrError):
    """A factored adapter file that cannot be read, or one to be written where a file is already."""

    code = "adapter_file_unusable"


@app.command("import")
def import_(
    checkpoint: Annotated[Path, typer.Argument(help="Directory that peft's save_pretrained wrote.")],
    out: Annotated[Path, typer.Argument(help="The safetensors file to write: <module>.a, .q and .r, all fp32.")],
) -> None:
    """Factorize a peft LoRA checkpoint: for each module scale * B = Q R, beside its A."""
    import torch
    from safetensors.torch import save_file

    from seqr.factorize import factorize
    from seqr.peft_checkpoint import read_checkpoint

    if out.exists():
        raise AdapterFileUnusable(f"{out} exists; choose a new file")
    factors = read_checkpoint(checkpoint)
    tensors: dict[str, torch.Tensor] = {}
    for module, one in factors.items():
        q, r = factorize(one.b, 1.0)
        tensors |= {f"{module}.a": one.a, f"{module}.q": q, f"{module}.r": r}
    save_file(tensors, out)
    rank = next(iter(factors.values())).a.shape[0]
    print(f"{out}: {len(factors)} modules of rank {rank}, {out.stat().st_size:,} bytes")


@app.command()
def export(
    factored: Annotated[Path, typer.Argument(help="A file that 'seqr adapter import' wrote.")],
    out: Annotated[Path, typer.Argument(help="A new directory for peft's PeftModel.from_pretrained.")],
    base_model: Annotated[str, typer.Option(help="Name or path of the base model, for peft's notes.")] = "",
) -> None:
    """Write a peft LoRA checkpoint with B = Q R and the LoRA scale 1."""
    from seqr.adapter import decode_tensors
    from seqr.peft_checkpoint import write_checkpoint
    from seqr.routers.pool import LoraFactors

    try:
        named = decode_tensors(factored.read_bytes())
    except OSError as error:
        raise AdapterFileUnusable(f"{factored} cannot be read: {error.strerror}") from error
    parts: dict[str, dict[str, object]] = {}
    for name in named:
        module, _, part = name.rpartition(".")
        parts.setdefault(module, {})[part] = None
    odd = next((module for module, found in sorted(parts.items()) if set(found) != {"a", "q", "r"}), None)
    if odd is not None or not parts:
        raise AdapterFileUnusable(f"{factored} must have a, q and r for every module; it differs in {odd or 'all'}")
    factors = {}
    for module in parts:
        a, q, r = (named[f"{module}.{part}"] for part in ("a", "q", "r"))
        factors[module] = LoraFactors(a, (q.double() @ r.double()).float())
    write_checkpoint(factors, out, base_model)
    print(f"{out}: a LoRA of {len(factors)} modules for peft")
