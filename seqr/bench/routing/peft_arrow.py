"""peft's own Arrow layer (``create_arrow_model``) as a peer: one Linear, few adapters, the whole layer timed."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seqr.bench.routing.grid import Say
from seqr.bench.routing.layer import DEPTH, RANK, Stack
from seqr.bench.routing.timing import interleave

# adapters, width, tokens
PEERS: tuple[tuple[int, int, int], ...] = ((8, 576, 32), (64, 576, 32), (64, 4096, 32))


class PeftMissing(Exception):
    """peft is not installed: it comes with seqr[silo]."""


class _OneLinear(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x)
        return out


def run_peers(peers: Sequence[tuple[int, int, int]], budget_s: float, say: Say) -> list[dict[str, Any]]:
    """Per (N, n, T): seconds of one bare Linear, of one with peft's Arrow (top_k 1) and of one of ours.

    Raises ``PeftMissing``.
    """
    out = []
    for adapters, width, tokens in peers:
        say(f"peft Arrow: N={adapters}, n={width}, T={tokens}")
        stack, arrow = Stack(adapters, width, tokens), _arrow_model(adapters, width)
        x = stack.x[None]

        def peft(arrow: Any = arrow, x: torch.Tensor = x) -> None:
            for _ in range(DEPTH):
                arrow(x)

        timings = interleave({"bare": stack.bare, "peft": peft, "ours": stack.routed}, budget_s)
        out.append(
            {"adapters": adapters, "width": width, "tokens": tokens, "rank": RANK}
            | {f"{name} seconds": timing.median / DEPTH for name, timing in timings.items()}
        )
    return out


def _arrow_model(adapters: int, width: int) -> Any:
    try:
        from peft import ArrowConfig, LoraConfig, create_arrow_model, get_peft_model
    except ImportError as error:
        raise PeftMissing("peft's Arrow layer was not measured: pip install 'seqr[silo]'") from error
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        paths = []
        for i in range(adapters):
            config = LoraConfig(r=RANK, target_modules=["linear"], init_lora_weights=False)
            path = Path(directory) / str(i)
            get_peft_model(_OneLinear(width), config).save_pretrained(str(path))
            paths.append(str(path))
        model = create_arrow_model(
            base_model=_OneLinear(width),
            task_specific_adapter_paths=paths,
            arrow_config=ArrowConfig(top_k=1, rng_seed=0),
        )
    return model.eval()
