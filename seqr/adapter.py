"""The adapter: what a silo trained, as Q, R, mu and sigma per module, and its one byte form."""

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save

from seqr.canonical import JsonMalformed, array_digest, canonical_json, parse_json, sha256_hex
from seqr.errors import SeqrError

MAX_HEADER_BYTES = 16 * 1024 * 1024
PARTS = ("q", "r", "mu", "sigma")


class AdapterMalformed(SeqrError):
    """Bytes that are not a safetensors file of fp32 tensors named as an adapter's are."""

    code = "adapter_malformed"


@dataclass(frozen=True)
class ModuleAdapter:
    """One module's share: q fp32 [m, r] with orthonormal columns, r fp32 [r, r] upper triangular with the LoRA scale
    folded in, and mu, sigma, the mean and standard deviation of ||R z|| in calibration (rounded to fp32, as stored).
    """

    q: torch.Tensor
    r: torch.Tensor
    mu: float
    sigma: float

    def __post_init__(self) -> None:
        # Stored as fp32: rounding here makes the adapter in memory and the one read back the same value.
        object.__setattr__(self, "mu", float(np.float32(self.mu)))
        object.__setattr__(self, "sigma", float(np.float32(self.sigma)))


@dataclass(frozen=True)
class Adapter:
    """An adapter of a base model, by module name."""

    modules: dict[str, ModuleAdapter]

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by their stored names ``<module>.q|.r|.mu|.sigma``, fp32, contiguous, on the CPU."""
        named = {}
        for name, module in self.modules.items():
            scalars = {"mu": torch.tensor(module.mu), "sigma": torch.tensor(module.sigma)}
            for part, tensor in ({"q": module.q, "r": module.r} | scalars).items():
                named[f"{name}.{part}"] = tensor.detach().to("cpu", torch.float32).contiguous()
        return named

    def to_bytes(self) -> bytes:
        """The safetensors file: equal adapters give equal bytes."""
        # Cloned, because safetensors refuses tensors that share storage, as two views of one matrix may.
        return bytes(safetensors_save({name: t.clone() for name, t in sorted(self.tensors().items())}))

    def tensor_digests(self) -> dict[str, str]:
        """SHA-256 (hex) of every tensor, by stored name."""
        return digests_of(self.tensors())

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over the canonical JSON of the tensor digests: the adapter's identity."""
        return adapter_digest(self.tensor_digests())

    @classmethod
    def from_bytes(cls, data: bytes) -> "Adapter":
        """Read ``to_bytes``; raises ``AdapterMalformed``. A stranger's bytes go through ``seqr.intake`` instead."""
        return cls.from_tensors(decode_tensors(data))

    @classmethod
    def from_tensors(cls, named: dict[str, torch.Tensor]) -> "Adapter":
        """Group tensors by module; raises ``AdapterMalformed`` unless every module has exactly q, r, mu and sigma."""
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in named.items():
            module, _, part = name.rpartition(".")
            parts.setdefault(module, {})[part] = tensor
        modules = {}
        for module, found in sorted(parts.items()):
            if set(found) != set(PARTS) or found["mu"].shape != () or found["sigma"].shape != ():
                raise AdapterMalformed(
                    f"module {module!r} must have q, r and the scalars mu and sigma, got {sorted(found)}"
                )
            modules[module] = ModuleAdapter(found["q"], found["r"], float(found["mu"]), float(found["sigma"]))
        return cls(modules)


def digests_of(named: dict[str, torch.Tensor]) -> dict[str, str]:
    """SHA-256 (hex) of each tensor."""
    return {name: array_digest(tensor.numpy()) for name, tensor in named.items()}


def adapter_digest(tensor_digests: dict[str, str]) -> str:
    """The adapter's identity from the digests of its tensors."""
    return sha256_hex(canonical_json(tensor_digests))


def decode_tensors(data: bytes) -> dict[str, torch.Tensor]:
    """The fp32 tensors of a safetensors file, which may come from a stranger; raises ``AdapterMalformed``.

    The header is read first: only fp32 is decoded, and free-form metadata is refused, since no digest would cover it.
    """
    for name, entry in _header(data).items():
        if name == "__metadata__":
            raise AdapterMalformed("the tensors carry free-form metadata, which an adapter may not have")
        if not isinstance(entry, dict) or entry.get("dtype") != "F32":
            got = entry.get("dtype") if isinstance(entry, dict) else entry
            raise AdapterMalformed(f"tensor {name[:200]!r} must be F32, got {got!r:.40}")
    try:
        return dict(safetensors_load(data))
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise AdapterMalformed(f"the tensors are not a safetensors file: {str(error)[:200]}") from None


def _header(data: bytes) -> dict[str, Any]:
    if len(data) < 8:
        raise AdapterMalformed(f"{len(data)} bytes are too few for a safetensors file")
    (size,) = struct.unpack_from("<Q", data)
    if size > min(MAX_HEADER_BYTES, len(data) - 8):
        raise AdapterMalformed(f"the safetensors header claims {size} bytes of {len(data)}")
    try:
        header = parse_json(data[8 : 8 + size], "the safetensors header", MAX_HEADER_BYTES)
    except JsonMalformed as error:
        raise AdapterMalformed(str(error)) from None
    if not isinstance(header, dict):
        raise AdapterMalformed("the safetensors header is not a JSON object")
    return header
