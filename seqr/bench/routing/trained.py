"""Adapters that were really trained, if on a toy, and libraries of any size built around them.

Nobody has 100,000 trained adapters of one plan. What is here: the tiny random Llama of ``seqr.tiny_model``, its first
layer's down projection (128 to 64), one shared A, and for each of 12 made-up languages two LoRAs whose B alone was
trained on two different halves of that language's text. A library of N is made of these 24 by interpolation:

    B = (1 - w) B_i + w B_j + e (B_k - B_k')        w uniform in [0, 1], e normal

with i, j any two of the 24 and k, k' the two halves of one language: the last term is what training on other records of
the same owner changes, the first two are owners between the known ones. mu and sigma are those of the base model's own
hidden states on a 13th language, tokens for routing are its hidden states on text that was not trained on.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torch.nn import functional as F

from seqr.models import load_base_model
from seqr.routed_linear import find_linear
from seqr.shared_a import draw_a
from seqr.tiny_model import build_tiny_model

LANGUAGES = 12
MODULE = "model.layers.0.mlp.down_proj"
_LETTERS = 26
_WORDS = 40
_LENGTH = 64


@dataclass(frozen=True)
class Seeds:
    """b fp32 [12, 2, m, r]: the trained B's by language and half; calibration and tokens z fp32 [*, r]."""

    b: torch.Tensor
    calibration: torch.Tensor
    tokens: torch.Tensor


def train_seeds(rank: int, steps: int = 24, seed: int = 0) -> Seeds:
    """Train the 24 adapters of rank ``rank``: well under a minute on one core."""
    with TemporaryDirectory() as directory:
        model, _ = load_base_model(build_tiny_model(Path(directory) / "tiny"), torch.float32)
    model.requires_grad_(False)
    linear = find_linear(model, MODULE, 128, 64, "the benchmark")
    a = draw_a(seed, MODULE, rank, linear.in_features)
    lora = _Lora(linear, a)
    trained = [[_train(model, lora, language, half, steps) for half in range(2)] for language in range(LANGUAGES)]
    lora.b = None
    calibration = _hidden(model, lora, _text(LANGUAGES, 2, 32))
    tokens = torch.cat([_hidden(model, lora, _text(language, 3, 8)) for language in range(LANGUAGES)])
    lora.remove()
    order = torch.randperm(tokens.shape[0], generator=torch.Generator().manual_seed(seed))
    return Seeds(torch.stack([torch.stack(pair) for pair in trained]), calibration, tokens[order])


def expand(seeds: Seeds, count: int, seed: int = 0, at_once: int = 4096) -> Iterator[torch.Tensor]:
    """R fp32 [*, r, r] of ``count`` adapters around the seeds, in chunks; the first 24 are the seeds themselves."""
    generator = torch.Generator().manual_seed(seed)
    every = seeds.b.flatten(0, 1).to(torch.float64)
    retrained = (seeds.b[:, 0] - seeds.b[:, 1]).to(torch.float64)
    for start in range(0, count, at_once):
        size = min(at_once, count - start)
        i, j = torch.randint(every.shape[0], (2, size), generator=generator)
        k = torch.randint(retrained.shape[0], (size,), generator=generator)
        w, e = torch.rand(size, 1, 1, generator=generator), torch.randn(size, 1, 1, generator=generator)
        b = (1.0 - w) * every[i] + w * every[j] + e * retrained[k]
        if start == 0:
            b[: every.shape[0]] = every[:size]
        r = torch.linalg.qr(b).R
        sign = torch.where(r.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0)
        yield (sign[:, :, None] * r).triu().to(torch.float32)


class _Lora:
    """y + 2 B A x on one Linear while ``b`` is set; remembers the last x."""

    def __init__(self, linear: nn.Linear, a: torch.Tensor):
        self.a = a
        self.out_features = linear.weight.shape[0]
        self.b: torch.Tensor | None = None
        self.z = torch.empty(0)
        self._handle = linear.register_forward_hook(self._hook)

    def _hook(self, module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        self.z = inputs[0] @ self.a.T
        return output if self.b is None else output + 2.0 * self.z @ self.b.T

    def remove(self) -> None:
        self._handle.remove()


def _train(model: nn.Module, lora: _Lora, language: int, half: int, steps: int) -> torch.Tensor:
    b = torch.zeros(lora.out_features, lora.a.shape[0], requires_grad=True)
    lora.b = b
    optimizer = torch.optim.AdamW([b], lr=5e-3)
    text = _text(language, half, 48)
    for step in range(steps):
        ids = text[(step * 6) % 48 : (step * 6) % 48 + 6]
        logits = model(input_ids=ids).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        (b.grad,) = torch.autograd.grad(loss, [b])
        optimizer.step()
    return 2.0 * b.detach()


def _hidden(model: nn.Module, lora: _Lora, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        model(input_ids=ids)
    # Position 0 is an attention sink.
    return lora.z[:, 1:].flatten(0, 1).clone()


def _text(language: int, part: int, rows: int) -> torch.Tensor:
    """int64 [rows, 64]: words of a language, drawn by a Zipf law, as the tiny tokenizer's byte ids."""
    words = torch.Generator().manual_seed(1000 + language)
    vocabulary = []
    for _ in range(_WORDS):
        length = int(torch.randint(2, 8, (1,), generator=words))
        vocabulary.append((67 + torch.randint(_LETTERS, (length,), generator=words)).tolist())
    draw = torch.Generator().manual_seed(10 * language + part)
    odds = 1.0 / torch.arange(1, _WORDS + 1)
    out = []
    for _ in range(rows):
        ids: list[int] = []
        for word in torch.multinomial(odds, _LENGTH, replacement=True, generator=draw).tolist():
            ids += [*vocabulary[word], 223]
        out.append(ids[:_LENGTH])
    return torch.tensor(out)
