"""Supervised rows and their loss: for SFT, and for the pretraining term of PPO-ptx."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from learner.policy import PolicyModel
from learner.sweep import Share
from reward_service.chat import chat_prompt
from reward_service.rows import read_rows


@dataclass(frozen=True)
class SupervisedBatch:
    """Rows of prompt and completion ids; the loss is on completion tokens, end-of-sequence included."""

    prompt_ids: tuple[np.ndarray, ...]
    completion_ids: tuple[np.ndarray, ...]

    @cached_property
    def lengths(self) -> list[int]:
        return [len(p) + len(c) for p, c in zip(self.prompt_ids, self.completion_ids, strict=True)]

    @cached_property
    def num_loss_tokens(self) -> int:
        return sum(len(ids) for ids in self.completion_ids)

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def take(self, indices: Sequence[int] | np.ndarray) -> SupervisedBatch:
        return SupervisedBatch(
            tuple(self.prompt_ids[i] for i in indices),
            tuple(self.completion_ids[i] for i in indices),
        )


class SupervisedRows:
    """All rows of a file, and a shuffled batch of them for each step."""

    def __init__(self, rows: SupervisedBatch, *, batch_size: int, seed: int) -> None:
        self._rows = rows
        self._batch_size = batch_size
        self._seed = seed

    def batch(self, number: int) -> SupervisedBatch:
        """Batch `number` (from 0) of endless epochs; the same on every rank and after a resume."""
        places = range(number * self._batch_size, (number + 1) * self._batch_size)
        size = len(self._rows)
        orders = {epoch: self._order(epoch) for epoch in {place // size for place in places}}
        return self._rows.take([orders[place // size][place % size] for place in places])

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._rows))


def load_supervised(path: str, tokenizer: Any, max_tokens: int) -> SupervisedBatch:
    """Rows with `prompt` and `completion`, or `messages` whose last one is the completion.

    Raises ValueError (one line: what, where, the fix) on a missing file or column, an empty
    completion, or a row longer than `max_tokens`.
    """
    rows = read_rows(path, any_of=("completion", "messages"))
    encoded = [_encode(f"{path}: row {i}", row, tokenizer) for i, row in enumerate(rows, 1)]
    for i, (prompt, completion) in enumerate(encoded, 1):
        if len(prompt) + len(completion) > max_tokens:
            raise ValueError(
                f"{path}: row {i} has {len(prompt) + len(completion)} tokens, max_tokens is {max_tokens}; "
                "raise max_tokens or shorten the row"
            )
    prompts, completions = zip(*encoded, strict=True)
    return SupervisedBatch(prompts, completions)


def _encode(where: str, row: Mapping[str, Any], tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    if row.get("messages") is not None:
        *context, last = row["messages"] or [{}]
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"{where}: has messages, but the tokenizer has no chat template; "
                "use prompt and completion columns"
            )
        if not context or last.get("role") != "assistant":
            raise ValueError(
                f"{where}: messages must hold a context and end with the assistant's; fix the row"
            )
        prompt: Any = chat_prompt(where, context, tokenizer)
        completion, special = last.get("content"), False
    else:
        prompt, completion, special = row.get("prompt"), row.get("completion"), True
    if not prompt or not completion:
        raise ValueError(f"{where}: prompt or completion is empty; remove the row")
    prompt_ids = tokenizer(prompt, add_special_tokens=special).input_ids
    completion_ids = tokenizer(completion, add_special_tokens=False).input_ids
    return np.array(prompt_ids), np.array([*completion_ids, tokenizer.eos_token_id])


def supervised_loss(
    policy: PolicyModel, batch: SupervisedBatch, indices: Sequence[int], share: Share
) -> Tensor:
    """-log pi(completion | prompt), summed over the rows `indices`, over the batch's token count:
    summed over microbatches and ranks it is the mean over the batch's completion tokens."""
    logprobs, _, _ = policy(share.pack(batch, indices))
    return -logprobs.sum() / batch.num_loss_tokens
