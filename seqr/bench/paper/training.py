"""One LoRA adapter per task, as the paper trains them (SEQR paper, appendix D): attention Linears, rank 32, alpha 64.

Here all rows of a batch have nearly the same length, the loss is that of the answer alone, and there is no dropout (the
paper: 0.05): 400 rows are too few for it to matter and every product counts on a small machine.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import get_cosine_schedule_with_warmup

from seqr.bench.paper.tasks import Example
from seqr.routers.interface import Batch
from seqr.routers.mixture_model import hidden_states
from seqr.routers.pool import LoraFactors
from seqr.shared_a import draw_a


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained; two adapters of the same recipe, task, seed and rows have the same bytes."""

    rank: int = 32
    alpha: float = 64.0
    learning_rate: float = 2e-3
    epochs: int = 1
    batch_size: int = 8
    warmup: float = 0.05
    version: int = 1  # raised whenever a change here changes what is trained

    def described(self) -> dict[str, Any]:
        """As a JSON value."""
        return asdict(self)


def train_adapter(
    model: Any,
    modules: Mapping[str, tuple[int, int]],
    examples: Sequence[Example],
    pad_token: int,
    recipe: Recipe,
    seed: int,
    shared: bool,
) -> dict[str, LoraFactors]:
    """Train B (and A, unless ``shared``) and return both per module, the LoRA scale folded into b.

    modules: (out, in) features by name. shared: every A is the plan-style draw of ``seed`` and frozen; otherwise it is
    drawn for this task alone and learns. ``model`` is left as it was.
    """
    torch.manual_seed(seed)
    lora = LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=0.0, target_modules=list(modules))
    adapted = get_peft_model(model, lora)
    try:
        layers = {name: adapted.get_base_model().get_submodule(name) for name in modules}
        for name, (_, inputs) in modules.items():
            weight = layers[name].lora_A["default"].weight
            with torch.no_grad():
                weight.copy_(draw_a(seed, name, recipe.rank, inputs))
            weight.requires_grad_(not shared)
        _fit(adapted, examples, pad_token, recipe, seed)
        scale = recipe.alpha / recipe.rank
        return {
            name: LoraFactors(
                layer.lora_A["default"].weight.detach().clone(), layer.lora_B["default"].weight.detach() * scale
            )
            for name, layer in layers.items()
        }
    finally:
        adapted.unload()


def batches(examples: Sequence[Example], size: int, order: random.Random) -> list[list[Example]]:
    """The examples in batches of like length, the batches in random order."""
    ranked = sorted(examples, key=lambda e: (len(e.prompt) + len(e.candidates[e.gold]), e.text))
    out = [ranked[start : start + size] for start in range(0, len(ranked), size)]
    order.shuffle(out)
    return out


def _fit(adapted: Any, examples: Sequence[Example], pad_token: int, recipe: Recipe, seed: int) -> None:
    order = random.Random(seed)
    plan = [batch for _ in range(recipe.epochs) for batch in batches(examples, recipe.batch_size, order)]
    learning = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    # Fused, it counts its steps on a GPU; else it would ask for every parameter's count in every step.
    fused = learning[0].is_cuda or None
    optimizer = torch.optim.AdamW(learning, lr=recipe.learning_rate, weight_decay=0.0, fused=fused)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, round(recipe.warmup * len(plan))), len(plan))
    adapted.train()
    model = adapted.get_base_model()
    for lesson in [Lesson.of(batch, pad_token) for batch in plan]:  # all on the device before the first step
        loss = answer_loss(model, lesson)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    adapted.eval()


@dataclass(frozen=True)
class Lesson:
    """One batch of training rows on its device.

    ids int64 [S, L]; rows, columns int64 [K]: from where in ids each of the answers' K tokens is predicted.
    """

    layout: Batch
    ids: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor

    @classmethod
    def of(cls, batch: Sequence[Example], pad_token: int) -> "Lesson":
        """The rows' prompts with their right answers."""
        sequences = [e.prompt + e.candidates[e.gold] for e in batch]
        layout, ids = Batch.of(sequences, 0, pad_token, [len(e.prompt) for e in batch])
        places = [(i, p - 1) for i, e in enumerate(batch) for p in range(len(e.prompt), len(sequences[i]))]
        rows, columns = (torch.tensor(index) for index in zip(*places, strict=True))
        return cls(layout, ids, rows, columns)


def answer_loss(model: Any, lesson: Lesson) -> torch.Tensor:
    """The mean negative log-likelihood of the answers' tokens, with the output head on their positions only."""
    hidden = hidden_states(model, lesson.ids, lesson.layout)
    logits = model.get_output_embeddings()(hidden[lesson.rows, lesson.columns])
    return F.cross_entropy(logits.float(), lesson.ids[lesson.rows, lesson.columns + 1])
