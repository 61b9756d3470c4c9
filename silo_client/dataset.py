"""Records as tokens: the chat template, the loss on the completion alone, and the fixed schedule of batches."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch.utils.data import Dataset

from silo_client.errors import ChatTemplateUnusable, DataError, PromptTooLong, RecordTooLong
from silo_client.records import Record, training_order

IGNORED = -100  # the label that torch's cross entropy leaves out


@dataclass(frozen=True)
class Example:
    """One tokenised record. Tokens from ``prompt_length`` on are the completion, with its end-of-turn token."""

    record: Record
    tokens: tuple[int, ...]
    prompt_length: int


class Encoder:
    """Turns records into token ids exactly as the gateway will: the prompt is rendered and tokenised by itself."""

    def __init__(self, tokenizer: Any, limit: int) -> None:
        self._tokenizer = tokenizer
        self._limit = limit

    def encode(self, record: Record) -> Example:
        """Tokenise one record.

        Raises:
            PromptTooLong, RecordTooLong: it does not fit into the plan's or the base model's length.
            ChatTemplateUnusable: the tokenizer has no chat template, or one that does not put the answer last.
        """
        asked = [{"role": "user", "content": record.prompt}]
        prompt_text = self._render(asked, add_generation_prompt=True)
        full_text = self._render([*asked, {"role": "assistant", "content": record.completion}])
        if not full_text.startswith(prompt_text):
            raise ChatTemplateUnusable("the base model's chat template does not continue a prompt with its answer")
        prompt = self._tokens(prompt_text)
        completion = self._up_to_end_of_turn(self._tokens(full_text[len(prompt_text) :]))
        length = len(prompt) + len(completion)
        if len(prompt) >= self._limit:
            raise PromptTooLong(
                record.where,
                f"the prompt has {len(prompt)} tokens with its chat frame, and {self._limit} fit; shorten it",
            )
        if length > self._limit:
            raise RecordTooLong(
                record.where,
                f"prompt and completion have {length} tokens together, and {self._limit} fit; shorten them",
            )
        return Example(record, (*prompt, *completion), len(prompt))

    def encode_all(self, records: Iterable[Record]) -> tuple[list[Example], list[DataError]]:
        """Tokenise ``records`` in their order; those that do not fit come back as errors."""
        examples: list[Example] = []
        problems: list[DataError] = []
        for record in records:
            try:
                examples.append(self.encode(record))
            except (PromptTooLong, RecordTooLong) as error:
                problems.append(error)
        return examples, problems

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (ValueError, TemplateError):
            raise ChatTemplateUnusable("the base model's tokenizer has no chat template that can be used") from None
        return str(text)

    def _tokens(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _up_to_end_of_turn(self, completion: list[int]) -> list[int]:
        end = self._tokenizer.eos_token_id
        if end in completion:
            last = len(completion) - 1 - completion[::-1].index(end)
            return completion[: last + 1]
        return [*completion, end]


def length_limit(plan_length: int, model_config: Any) -> int:
    """How many tokens a record may have: the plan's limit, or the base model's context where that is shorter."""
    return min(plan_length, int(getattr(model_config, "max_position_embeddings", None) or plan_length))


class Schedule(Dataset[Example]):
    """``steps * batch_size`` examples in the order they are trained on: every epoch in an order of its own.

    A list laid out beforehand, read front to back, so that a resumed run goes on exactly where the killed one stood.
    """

    def __init__(self, examples: Sequence[Example], plan_id: str, steps: int, batch_size: int) -> None:
        self._by_key = {example.record.key: example for example in examples}
        self._records = [example.record for example in examples]
        self._plan_id = plan_id
        self._length = steps * batch_size
        self._epochs: dict[int, list[Record]] = {}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        epoch, place = divmod(index, len(self._records))
        if epoch not in self._epochs:
            self._epochs[epoch] = training_order(self._records, self._plan_id, epoch)
        return self._by_key[self._epochs[epoch][place].key]

    def used(self) -> list[Example]:
        """The distinct examples that occur in the schedule, in their first order."""
        return [self[index] for index in range(min(self._length, len(self._records)))]


def collate(examples: Sequence[Example], pad_token: int) -> dict[str, torch.Tensor]:
    """One batch, padded to its longest example.

    Returns:
        input_ids, attention_mask, labels: int64 [batch, longest].
        logits_to_keep: int64 [kept], the positions at which some example predicts a completion token. Only there does
            the model need logits, and over a large vocabulary they are a good part of its cost.
        shift_labels: int64 [batch, kept], the token that follows each of these positions, or ``IGNORED``.
    """
    longest = max(len(example.tokens) for example in examples)
    shape = (len(examples), longest)
    tokens = torch.full(shape, pad_token, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    for row, example in enumerate(examples):
        length = len(example.tokens)
        tokens[row, :length] = torch.tensor(example.tokens, dtype=torch.int64)
        mask[row, :length] = 1
        labels[row, example.prompt_length : length] = tokens[row, example.prompt_length : length]
    kept = (labels[:, 1:] != IGNORED).any(dim=0).nonzero().squeeze(1)
    return {
        "input_ids": tokens,
        "attention_mask": mask,
        "labels": labels,
        "logits_to_keep": kept,
        "shift_labels": labels[:, kept + 1],
    }
