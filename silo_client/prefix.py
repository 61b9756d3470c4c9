"""A batch's common beginning, computed once.

Every record of a silo begins with the same chat frame, which for a small base model is easily a third of the record.
Its keys and values are the same in every row, so they are computed for one row and lent to the others; the gradient
flows back through all of them. The loss and its gradient are those of the full batch.
"""

from typing import Any

import torch
from transformers import DynamicCache, Trainer
from transformers.cache_utils import DynamicLayer

WORTH_SHARING = 4  # tokens: below this the second call of the model costs more than it saves


class PrefixSharingTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer on batches of ``silo_client.dataset.collate``."""

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        return super().compute_loss(model, share_prefix(model, inputs), return_outputs, num_items_in_batch)


def share_prefix(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """``batch`` without its common beginning, and with the keys and values of that beginning in its place."""
    length = prefix_length(batch["input_ids"], int(batch["logits_to_keep"][0]))
    if length < WORTH_SHARING or not _plain_cache(model):
        return batch
    cache = model(input_ids=batch["input_ids"][:1, :length], use_cache=True, logits_to_keep=1).past_key_values
    rows = batch["input_ids"].shape[0]
    for layer in cache.layers:
        layer.keys = layer.keys.expand(rows, -1, -1, -1)
        layer.values = layer.values.expand(rows, -1, -1, -1)
    return {
        **batch,
        "input_ids": batch["input_ids"][:, length:],
        "labels": batch["labels"][:, length:],
        "logits_to_keep": batch["logits_to_keep"] - length,
        "past_key_values": cache,
        "use_cache": True,
    }


def prefix_length(tokens: torch.Tensor, at_most: int) -> int:
    """How many leading columns of ``tokens`` [batch, length] are the same in every row; 0 for a single row."""
    if tokens.shape[0] < 2:
        return 0
    same = (tokens[:, :at_most] == tokens[:1, :at_most]).all(dim=0)
    return int(same.long().cumprod(dim=0).sum())


def _plain_cache(model: Any) -> bool:
    # Sliding windows, recurrent states and the like cannot simply be lent to another row.
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
