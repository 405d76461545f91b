"""Supervised rows as token ids: for SFT, and for the pretraining term of PPO-ptx. Loads no torch: they are
checked before anything is started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from reward_service.chat import chat_reply
from reward_service.rows import read_rows, text_of
from reward_service.tokenizer import end_id, prompt_ids, reply_ids


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


def load_supervised(
    path: str, tokenizer: Any, max_tokens: int, *, key: str = "max_tokens"
) -> SupervisedBatch:
    """Rows with `prompt` and `completion`, or `messages` whose last one is the completion.

    Raises ValueError (one line: what, where, the fix) on a missing file or column, a row that is no
    text or conversation, an empty completion, or a row longer than `max_tokens`, which the config
    calls `key`.
    """
    rows = read_rows(path, any_of=("completion", "messages"))
    encoded = [_encode(f"{path}: row {i}", row, tokenizer) for i, row in enumerate(rows, 1)]
    for i, (prompt, completion) in enumerate(encoded, 1):
        if (length := len(prompt) + len(completion)) > max_tokens:
            raise ValueError(
                f"{path}: row {i} has {length} tokens, {key} is {max_tokens}; raise it, or shorten the row"
            )
    prompts, completions = zip(*encoded, strict=True)
    return SupervisedBatch(prompts, completions)


def _encode(where: str, row: Mapping[str, Any], tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    chat = row.get("messages") is not None
    if chat:
        prompt, completion = chat_reply(f"{where}: messages", row["messages"], tokenizer)
    else:
        prompt, completion = (text_of(where, row, name) for name in ("prompt", "completion"))
    if not prompt or not completion:
        raise ValueError(f"{where}: prompt or completion is empty; remove the row")
    before = prompt_ids(prompt, tokenizer, chat=chat)
    if not before:
        raise ValueError(f"{where}: the prompt has no tokens for this tokenizer; remove the row")
    return np.array(before), np.array([*reply_ids(completion, tokenizer), end_id(tokenizer)])
