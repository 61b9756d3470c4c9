"""LORAUTER: a sentence encoder finds the nearest tasks, whose adapters are mixed in output space (Dhasade et al.).

The query's embedding is compared with one vector per task, the mean of up to 200 embeddings of that task's validation
prompts; the K nearest tasks' adapters are weighted by a softmax of the cosines over tau. It needs task data at the
server, which a federation of silos does not have: it is here to be compared with.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from seqr.routers.interface import Activation, Batch, Mixture, Router, RouterMisused
from seqr.routers.pool import AdapterPool

# Texts -> their embeddings fp32 [S, d].
Encoder = Callable[[Sequence[str]], torch.Tensor]
VALIDATION_ROWS = 200


class LorauterRouter(Router):
    """weights = softmax(cosine / tau) over the K nearest tasks, once per query, the same in every module."""

    name = "lorauter"

    def __init__(
        self,
        pool: AdapterPool,
        encoder: Encoder,
        tasks: Mapping[str, torch.Tensor],
        adapter_of: Mapping[str, str],
        k: int = 3,
        tau: float = 0.2,
    ):
        """tasks: task vectors fp32 [d] by task (``task_vector``); adapter_of: the adapter that serves each task.

        Raises ``RouterMisused`` for a task without an adapter of this pool.
        """
        super().__init__(pool)
        missing = [task for task in tasks if adapter_of.get(task) not in pool.names]
        if missing:
            raise RouterMisused(f"LORAUTER's task {missing[0]} has no adapter in this pool")
        self._encoder = encoder
        self._vectors = torch.stack([unit(vector) for vector in tasks.values()]) if tasks else torch.empty(0, 0)
        self._columns = torch.tensor([pool.column(adapter_of[task]) for task in tasks], dtype=torch.int64)
        self._k = k
        self._tau = tau

    def begin(self, batch: Batch) -> None:
        super().begin(batch)
        if not len(self._columns):
            self._mixture = Mixture.of_one(torch.full_like(batch.sequence, -1))
            return
        cosine = unit(self._encoder(batch.texts)) @ self._vectors.T
        cosine = cosine.masked_fill(~batch.permitted[:, self._columns], -torch.inf)
        best, task = cosine.topk(min(self._k, cosine.shape[1]), dim=1)
        weights = torch.softmax(best / self._tau, dim=1).nan_to_num(0.0)
        columns = self._columns[task].masked_fill(best == -torch.inf, -1)
        of_token = columns[batch.sequence].masked_fill(~batch.real[:, None], -1)
        self._mixture = Mixture(of_token, weights[batch.sequence])

    def mixture(self, activation: Activation) -> Mixture:
        return self._mixture


def task_vector(encoder: Encoder, prompts: Sequence[str]) -> torch.Tensor:
    """The mean embedding of up to 200 prompts: fp32 [d]."""
    return encoder(prompts[:VALIDATION_ROWS]).mean(0)


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """Scaled to length 1 along the last dimension."""
    return torch.nn.functional.normalize(vectors, dim=-1)


def successive_halving(
    candidates: Sequence[str], accuracy: Callable[[str, int], float], rows: int, first: int = 8
) -> str:
    """The adapter that serves a task best, evaluating the promising ones on more rows (Jamieson and Talwalkar 2016).

    accuracy: (adapter, number of rows) -> its share of right answers. Every round doubles the rows, up to ``rows``, and
    keeps the better half; ties stay in the order given. Raises ``RouterMisused`` for no candidates.
    """
    if not candidates:
        raise RouterMisused("successive halving needs at least one adapter")
    left, count = list(candidates), min(first, rows)
    while len(left) > 1:
        found = {name: accuracy(name, count) for name in left}
        left = sorted(left, key=lambda name: -found[name])[: (len(left) + 1) // 2]
        count = min(2 * count, rows)
    return left[0]
