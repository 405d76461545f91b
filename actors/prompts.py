"""PromptStream: rows of Parquet or JSONL -> token ids, in a shuffled order that can be resumed."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from actors.config import PromptsConfig
from actors.trajectory import Prompt
from reward_service.chat import chat_prompt
from reward_service.rows import read_rows
from reward_service.tokenizer import prompt_ids


def load_prompts(
    config: PromptsConfig, tokenizer: Any, max_tokens: int
) -> tuple[list[Prompt], list[str]]:
    """All prompts of the file (epoch 0), and the ids of those dropped as longer than `max_tokens`.

    Raises ValueError (one line: what, where, the fix) on a missing file or column, on no rows, on an
    empty prompt, on a prompt_id given twice, and on a long prompt unless the config drops them.
    """
    rows = read_rows(config.path, any_of=("prompt", "messages"))[: config.limit]
    limit = min(max_tokens, config.max_prompt_tokens or max_tokens)
    prompts = [_prompt(config.path, i, row, tokenizer) for i, row in enumerate(rows)]
    _check_ids(config.path, prompts)
    long = [prompt for prompt in prompts if len(prompt.ids) > limit]
    if long and config.on_too_long == "refuse":
        raise ValueError(
            f"{config.path}: {len(long)} of {len(prompts)} prompts are longer than {limit} tokens (first: "
            f"{long[0].prompt_id} with {len(long[0].ids)}); shorten them, raise generators.max_model_len, "
            "or set prompts.on_too_long: drop"
        )
    kept = [prompt for prompt in prompts if len(prompt.ids) <= limit]
    if not kept:
        raise ValueError(
            f"{config.path}: every prompt is longer than {limit} tokens; raise generators.max_model_len"
        )
    return kept, [prompt.prompt_id for prompt in long]


def _prompt(path: str, index: int, row: Mapping[str, Any], tokenizer: Any) -> Prompt:
    where = f"{path}: row {index + 1}"
    chat, messages = row.get("messages") is not None, None
    if chat:
        text = chat_prompt(f"{where}: messages", row["messages"], tokenizer)
        messages = [{key: said[key] for key in ("role", "content")} for said in row["messages"]]
    else:
        given = row.get("prompt")
        if not isinstance(given, str) or not given.strip():
            raise ValueError(f"{where}: the prompt is empty or no text; remove the row")
        text = given
    ids = prompt_ids(text, tokenizer, chat=chat)
    if not ids:
        raise ValueError(f"{where}: the prompt has no tokens for this tokenizer; remove the row")
    return Prompt(
        prompt_id=prompt_id_of(row, index),
        epoch=0,
        text=text,
        ids=tuple(ids),
        answer=_answer(where, row.get("answer")),
        metadata=_metadata(where, row.get("metadata")),
        messages=messages,
    )


def prompt_id_of(row: Mapping[str, Any], index: int) -> str:
    """Of the row at place `index` (from 0) of its file."""
    name = row.get("prompt_id")
    return f"p{index}" if name is None else str(name)


def _answer(where: str, value: Any) -> str | None:
    # NaN is how tables of numbers hold what is missing.
    if value is None or value != value:
        return None
    if isinstance(value, (list, dict, bytes)):
        kind = type(value).__name__
        raise ValueError(f"{where}: answer is {kind}, not text or a number; use metadata for it")
    return str(value)


def _metadata(where: str, value: Any) -> Mapping[str, Any]:
    """An object, also written as JSON text. It has to survive a checkpoint's JSON, and a scorer's."""
    try:
        given = json.loads(value) if isinstance(value, str) else value or {}
        metadata = json.loads(json.dumps(given), parse_constant=_refuse_constant)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: metadata is not JSON ({error}); correct it") from None
    if not isinstance(metadata, dict):
        raise ValueError(f"{where}: metadata is no JSON object; write {{...}}")
    return metadata


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _check_ids(path: str, prompts: Iterable[Prompt]) -> None:
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.prompt_id in seen:
            raise ValueError(
                f"{path}: prompt_id {prompt.prompt_id} stands twice; make the ids unique"
            )
        seen.add(prompt.prompt_id)


def digest_of(prompts: Iterable[Prompt]) -> str:
    """Of what a stream's cursor counts: the prompts' ids, their tokens and their order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.prompt_id, len(prompt.ids)]).encode())
        digest.update(array("i", prompt.ids).tobytes())
    return digest.hexdigest()


class PromptStream:
    """Endless epochs over the prompts, each in an order of its own that the seed decides.

    `cursor` counts the prompts handed out since the start; a stream made with it goes on exactly there.
    """

    def __init__(
        self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool, cursor: int = 0
    ) -> None:
        self._prompts = prompts
        self._seed = seed
        self._shuffle = shuffle
        self.cursor = cursor
        self.digest = digest_of(prompts)  # now: of a million prompts it takes seconds
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __next__(self) -> Prompt:
        epoch, place = divmod(self.cursor, len(self._prompts))
        if self._order[0] != epoch:
            self._order = (epoch, self._shuffled(epoch))
        self.cursor += 1
        return self._prompts[self._order[1][place]].of_epoch(epoch)

    def _shuffled(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(len(self._prompts))
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._prompts))
