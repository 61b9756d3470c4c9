"""--memory: how many adapters fit beside a model, by formulas that a test compares with a real library's bytes."""

from dataclasses import asdict, dataclass
from typing import Any

from seqr.library import Library
from seqr.routing.features import feature_count
from seqr.routing.products import COLUMN_BLOCK

GIB = 2**30


@dataclass(frozen=True)
class Shapes:
    """The adapted Linears of a model, (out, in) each with how many layers have it, and the model's own bytes."""

    name: str
    modules: tuple[tuple[int, int], ...]
    layers: int
    parameters: int
    kv_bytes_per_token: int


# Llama-3.1-8B: hidden 4096, 32 heads, 8 KV heads of 128, 32 layers, 8,030,261,248 parameters; q, k, v and o adapted.
LLAMA_8B = Shapes(
    "Llama-3.1-8B, attention",
    ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096)),
    layers=32,
    parameters=8_030_261_248,
    kv_bytes_per_token=2 * 32 * 8 * 128 * 2,
)


@dataclass(frozen=True)
class Placement:
    """Where an adapter's parts lie, in bytes per value; 0: not on the device.

    packed_r: R packed triangular, from which the exact choice is made; b: (Q R)^T. Scores are always fp32 and here.
    """

    name: str
    packed_r: int
    b_on_device: int
    b_on_host: int


PLACEMENTS = (
    Placement("routing on the device, Q in pinned host memory (bf16)", 4, 0, 2),
    Placement("all on the device, Q in bf16", 4, 2, 0),
    Placement("all on the device, Q in fp32 (the library of today)", 8, 4, 0),
)


@dataclass(frozen=True)
class Budget:
    """A device: its bytes, the KV cache's tokens and what activations and graphs take."""

    name: str
    device_bytes: int
    kv_tokens: int
    workspace_bytes: int


BUDGETS = (
    Budget("139 GiB", 139 * GIB, 64 * 8192, 4 * GIB),
    Budget("24 GiB", 24 * GIB, 8 * 4096, GIB),
)


def route_bytes(rank: int, packed_r: int = 0) -> int:
    """Device bytes of one adapter in one module, to route: 4 F (gram) + 4 (mu / sigma) + R. F = r (r + 1) / 2.

    packed_r: 4 for R packed in fp32, 8 for the library of today, which keeps R square: r^2 is nearly 2 F; with R go
    mu, sigma and the two constants of the rounding bound, fp64.
    """
    count = feature_count(rank)
    r = 4 * rank * rank if packed_r == 8 else packed_r * count
    return 4 * count + 4 + (r + 4 * 8 if packed_r else 0)


def library_bytes(adapters: int, rank: int, outs: list[int]) -> int:
    """Bytes of a ``seqr.library.Library``'s tensors: columns are padded to 64 for all that is stacked; b_t is not."""
    width = COLUMN_BLOCK * max(1, -(-adapters // COLUMN_BLOCK))
    return sum(width * route_bytes(rank, 8) + adapters * 4 * rank * out for out in outs)


def measured_bytes(library: Library) -> int:
    """The same, added up over the tensors of a library that exists."""
    total = 0
    for stack in library.stacks:
        truth = stack.truth
        kept = (stack.gram, stack.offset, truth.r, truth.mu, truth.sigma, truth.slope, truth.floor, *stack.b_t)
        total += sum(t.numel() * t.element_size() for t in kept)
    return total


def adapter_bytes(shapes: Shapes, rank: int, placement: Placement) -> tuple[int, int]:
    """(device, host) bytes of one adapter in all modules."""
    routes = route_bytes(rank, placement.packed_r) * len(shapes.modules) * shapes.layers
    b = rank * sum(out for out, _ in shapes.modules) * shapes.layers
    return routes + b * placement.b_on_device, b * placement.b_on_host


def fixed_bytes(shapes: Shapes, rank: int, budget: Budget) -> dict[str, int]:
    """What is on the device before the first adapter: bf16 weights, shared A in fp32, KV cache, workspace."""
    return {
        "weights": 2 * shapes.parameters,
        "shared A": 4 * rank * sum(n for _, n in shapes.modules) * shapes.layers,
        "KV cache": budget.kv_tokens * shapes.kv_bytes_per_token,
        "workspace": budget.workspace_bytes,
    }


def largest_library(shapes: Shapes, rank: int, budget: Budget, placement: Placement) -> int:
    """How many adapters fit on the device, in whole blocks of 64; 0 when the model alone does not."""
    free = budget.device_bytes - sum(fixed_bytes(shapes, rank, budget).values())
    device, _ = adapter_bytes(shapes, rank, placement)
    return max(0, free // device // COLUMN_BLOCK * COLUMN_BLOCK)


def run_memory(rank: int = 16, shapes: Shapes = LLAMA_8B) -> list[dict[str, Any]]:
    """Every budget with every placement."""
    out = []
    for budget in BUDGETS:
        for placement in PLACEMENTS:
            device, host = adapter_bytes(shapes, rank, placement)
            count = largest_library(shapes, rank, budget, placement)
            out.append(
                {
                    "model": shapes.name,
                    "rank": rank,
                    "device": asdict(budget),
                    "placement": placement.name,
                    "fixed bytes": fixed_bytes(shapes, rank, budget),
                    "device bytes per adapter": device,
                    "host bytes per adapter": host,
                    "adapters": count,
                    "host bytes of all": host * count,
                }
            )
    return out
