"""Reads what a reward model is trained and normalised on, as token ids."""

from __future__ import annotations

from typing import Any, NamedTuple

from reward_service.rows import read_rows


class Pair(NamedTuple):
    """Token ids: prompt, reply, end-of-sequence."""

    chosen: list[int]
    rejected: list[int]


def read_pairs(path: str, tokenizer: Any, max_tokens: int) -> list[Pair]:
    """Parquet or JSONL rows (prompt, chosen, rejected) -> token ids. ValueError names the row."""
    encode = _Encoder(path, tokenizer, max_tokens)
    rows = read_rows(path, columns=("prompt", "chosen", "rejected"))
    return [
        Pair(encode(number, row, "chosen"), encode(number, row, "rejected"))
        for number, row in enumerate(rows, 1)
    ]


def read_reference(path: str, tokenizer: Any, max_tokens: int) -> list[list[int]]:
    """Parquet or JSONL rows (prompt, completion) -> token ids. ValueError names the row."""
    encode = _Encoder(path, tokenizer, max_tokens)
    rows = read_rows(path, columns=("prompt", "completion"))
    return [encode(number, row, "completion") for number, row in enumerate(rows, 1)]


class _Encoder:
    """enc(prompt) + enc(reply) + end-of-sequence: the tokens a generator would have sampled.

    Special tokens of the tokenizer come with the prompt only, as when prompts are read for PPO.
    """

    def __init__(self, path: str, tokenizer: Any, max_tokens: int) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"{tokenizer.name_or_path}: tokenizer without end-of-sequence token; set eos_token"
            )
        self._path, self._tokenizer, self._max_tokens = path, tokenizer, max_tokens

    def __call__(self, number: int, row: dict[str, Any], reply: str) -> list[int]:
        for name in ("prompt", reply):
            if not isinstance(row.get(name), str):
                kind = type(row.get(name)).__name__
                raise ValueError(
                    f"{self._path}: row {number}: {name} is {kind}, not text; correct it"
                )
        ids = [
            *self._tokenizer(row["prompt"]).input_ids,
            *self._tokenizer(row[reply], add_special_tokens=False).input_ids,
            self._tokenizer.eos_token_id,
        ]
        if len(ids) > self._max_tokens:
            raise ValueError(
                f"{self._path}: row {number}: prompt and {reply} have {len(ids)} tokens, more than "
                f"max_tokens {self._max_tokens}; raise it, or leave the row out"
            )
        return ids
