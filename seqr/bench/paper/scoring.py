"""Which candidate answer a model finds most likely, under any router."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from seqr.bench.paper.tasks import Example
from seqr.routers.interface import Batch
from seqr.routers.mixture_model import hidden_states

# Opens the routing of one batch: (batch, ids, the row of each sequence) -> a context for its forward pass.
Routing = Callable[[Batch, torch.Tensor, list[int]], AbstractContextManager[None]]


def no_routing(_batch: Batch, _ids: torch.Tensor, _rows: list[int]) -> AbstractContextManager[None]:
    """The base model."""
    return nullcontext()


@dataclass(frozen=True)
class Stem:
    """One forward sequence of a row: its prompt and all but the last token of some candidates."""

    row: int
    tokens: tuple[int, ...]
    candidates: tuple[int, ...]


def sequences_of(row: int, example: Example) -> list[Stem]:
    """The fewest sequences that hold every candidate's log-likelihood: one, where all candidates are one token long."""
    stems: dict[tuple[int, ...], list[int]] = {}
    for index, candidate in sorted(enumerate(example.candidates), key=lambda item: -len(item[1])):
        stem = candidate[:-1]
        home = next((s for s in stems if s[: len(stem)] == stem), stem)
        stems.setdefault(home, []).append(index)
    return [Stem(row, example.prompt + stem, tuple(indexes)) for stem, indexes in stems.items()]


def like_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """The indexes of sequences in batches of like length, at most about 2,048 tokens each, shortest first; 16,384 on a
    GPU."""
    tokens = 2048 if torch.get_default_device().type == "cpu" else 16_384
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def answers(
    model: Any,
    examples: Sequence[Example],
    adapters: int,
    pad_token: int,
    routing: Routing = no_routing,
    permitted: torch.Tensor | None = None,
) -> list[int]:
    """The candidate of largest (weighted) log-likelihood for every example; the lowest index where two are equal.

    permitted bool [rows, N]: what each row may use, by default everything.
    """
    found: list[list[float]] = [[-torch.inf] * len(e.candidates) for e in examples]
    everything = [s for row, example in enumerate(examples) for s in sequences_of(row, example)]
    head = model.get_output_embeddings()
    for indexes in like_length([len(s.tokens) for s in everything]):
        batch = [everything[index] for index in indexes]
        rows = [s.row for s in batch]
        layout, ids = Batch.of(
            [s.tokens for s in batch],
            adapters,
            pad_token,
            [len(examples[row].prompt) for row in rows],
            [examples[row].text for row in rows],
            None if permitted is None else permitted[rows],
        )
        with torch.inference_mode(), routing(layout, ids, rows):
            hidden = hidden_states(model, ids, layout)
            starts = [len(examples[row].prompt) - 1 for row in rows]
            spoken = [hidden[i, start : len(s.tokens)] for i, (s, start) in enumerate(zip(batch, starts, strict=True))]
            log_p = torch.log_softmax(head(torch.cat(spoken)).float(), dim=-1)
            # Every token of every candidate is looked up at once, as asking a GPU for a number takes its time.
            firsts = accumulate((len(part) for part in spoken), initial=0)
            wanted = [
                (one.row, candidate, first + place, token)
                for one, first in zip(batch, firsts, strict=False)
                for candidate in one.candidates
                for place, token in enumerate(examples[one.row].candidates[candidate])
            ]
            _, _, places, tokens = zip(*wanted, strict=True)
            likelihoods = log_p[torch.tensor(places), torch.tensor(tokens)].tolist()
        totals: dict[tuple[int, int], float] = {}
        for (row, candidate, _, _), likelihood in zip(wanted, likelihoods, strict=True):
            totals[row, candidate] = totals.get((row, candidate), 0.0) + likelihood
        for (row, candidate), total in totals.items():
            found[row][candidate] = total / examples[row].weights[candidate]
    return [max(range(len(row)), key=lambda i: (row[i], -i)) for row in found]
