"""How large a library fits: counted for an 8B model, and the largest one that was built and routed."""

from dataclasses import dataclass, replace

import torch

from benchmarks.gpu.adapters import random_permissions
from benchmarks.gpu.layers import Shapes
from benchmarks.gpu.timing import interleaved
from seqr.kernels.candidates import Candidates
from seqr.kernels.expand import expand_tokens
from seqr.kernels.route import route_tokens
from seqr.kernels.tables import SiteTables, padded_features
from seqr.routing.features import feature_count

GIB = float(1 << 30)
MODEL_BYTES = 16.1e9
# KV cache, activations, the allocator's and the context's own.
RESERVE_BYTES = 4.0 * GIB
LAYERS_8B = 32


@dataclass(frozen=True)
class PerAdapter:
    """Bytes of one adapter on the four attention Linears of all layers: what chooses, and what is added."""

    route: int
    share: int

    @classmethod
    def of(cls, shapes: Shapes, layers: int = LAYERS_8B) -> "PerAdapter":
        outputs = sum(shapes.qkv) + shapes.hidden
        return cls(
            layers * 4 * (6 * padded_features(feature_count(shapes.rank)) + 4), layers * 2 * shapes.rank * outputs
        )


def counted(shapes: Shapes, card_gib: float) -> tuple[int, int]:
    """(adapters with everything on the card, adapters with only what chooses on it), beside an 8B model in bf16."""
    per, room = PerAdapter.of(shapes), card_gib * GIB - MODEL_BYTES - RESERVE_BYTES
    return int(room / (per.route + per.share)), int(room / per.route)


def measured(shapes: Shapes, tokens: int, device: torch.device, fraction: float = 0.97) -> str:
    """Fill the card with a model's bytes and a library for 32 layers; route and expand ``tokens`` through all of it."""
    per = PerAdapter.of(shapes)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        model = torch.empty(int(MODEL_BYTES), dtype=torch.uint8, device=device)
        layers, adapters = LAYERS_8B, int((fraction * free - MODEL_BYTES - RESERVE_BYTES) / (per.route + per.share))
    else:
        model, layers, adapters = torch.empty(1), 1, 64
    adapters = max(64, adapters // 64 * 64)
    tables = [
        _site(outputs, adapters, shapes.rank, device)
        for _ in range(layers)
        for outputs in (shapes.qkv, (shapes.hidden,))
    ]
    bits, row = random_permissions(adapters, adapters, tokens, device)
    z = [torch.randn(1, tokens, t.modules * shapes.rank, device=device) for t in tables[:2]]
    y = [torch.zeros(tokens, sum(t.outputs), dtype=torch.bfloat16, device=device) for t in tables[:2]]

    def through() -> None:
        for index, table in enumerate(tables):
            found, _ = route_tokens(z[index % 2], table, bits, row)
            expand_tokens(y[index % 2], z[index % 2], table, found)

    taken = interleaved({"all": through}, device, 3)["all"]
    used = sum(t.routing_bytes() + t.b_t.numel() * t.b_t.element_size() for t in tables) / GIB
    fine = bool(all(torch.isfinite(part).all() for part in y)) and bool((y[0] != 0).any())
    del model
    return f"{adapters} adapters, {used:.1f} GiB beside a model's 16.1 GB: {'PASS' if fine else 'FAIL'}, {taken:.1f} ms"


def pinned(shapes: Shapes, adapters: int, tokens: int, device: torch.device) -> str:
    """b_t in pinned host memory, read by the kernel for the winners only: the same bits, and how long it takes."""
    table = _site(shapes.qkv, adapters, shapes.rank, device)
    if device.type != "cuda":
        return "not on a CPU"
    host = replace(table, b_t=table.b_t.cpu().pin_memory())
    z = torch.randn(1, tokens, table.modules * table.rank, device=device)
    choice = Candidates.settled(torch.randint(0, adapters, (tokens,), dtype=torch.int32, device=device), table.modules)
    here, there = (torch.zeros(tokens, sum(shapes.qkv), dtype=torch.bfloat16, device=device) for _ in range(2))
    expand_tokens(here, z, table, choice)
    expand_tokens(there, z, host, choice)
    same = torch.equal(here, there)
    runs = {
        "card": lambda: expand_tokens(here, z, table, choice),
        "host": lambda: expand_tokens(there, z, host, choice),
    }
    times = interleaved(runs, device, 7)
    verdict = "PASS" if same else "FAIL"
    return f"{verdict}, {tokens} of {adapters}: {times['card']:.3f} ms from the card, {times['host']:.3f} from the host"


def _site(outputs: tuple[int, ...], adapters: int, rank: int, device: torch.device) -> SiteTables:
    adapters = adapters // 64 * 64
    gram = torch.empty(len(outputs), adapters // 64, feature_count(rank), 64, device=device).normal_()
    b_t = torch.empty(adapters, rank, sum(outputs), dtype=torch.bfloat16, device=device).normal_()
    return SiteTables.of(gram, torch.zeros(len(outputs), adapters, device=device), b_t, outputs)
