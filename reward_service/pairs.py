"""Reads what a reward model is trained and normalised on, as token ids.

Rows are texts, or conversations: lists of role and content. Of a conversation the last message, the
assistant's, is the reply, and all before it the prompt, which may also stand in a column of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from reward_service.chat import chat_reply
from reward_service.rows import read_rows, text_of
from reward_service.tokenizer import end_id, prompt_ids, reply_ids


class Pair(NamedTuple):
    """Token ids: prompt, reply, end-of-sequence."""

    chosen: list[int]
    rejected: list[int]


def read_pairs(path: str, tokenizer: Any, max_tokens: int) -> list[Pair]:
    """Parquet or JSONL rows (prompt, chosen, rejected) -> token ids. ValueError names the row."""
    encode = _Encoder(path, tokenizer, max_tokens)
    pairs = []
    for number, row in enumerate(read_rows(path, columns=("chosen", "rejected")), 1):
        pairs.append(Pair(encode(number, row, "chosen"), encode(number, row, "rejected")))
        if _context(row["chosen"]) != _context(row["rejected"]):
            raise ValueError(
                f"{path}: row {number}: chosen and rejected answer different conversations; correct it"
            )
    return pairs


def read_reference(path: str, tokenizer: Any, max_tokens: int) -> list[list[int]]:
    """Parquet or JSONL rows (prompt, completion) -> token ids. ValueError names the row."""
    encode = _Encoder(path, tokenizer, max_tokens)
    rows = read_rows(path, columns=("completion",))
    return [encode(number, row, "completion") for number, row in enumerate(rows, 1)]


class _Encoder:
    """enc(prompt) + enc(reply) + end-of-sequence: the tokens a generator would have sampled.

    Special tokens of the tokenizer come with the prompt only, as when prompts are read for PPO.
    """

    def __init__(self, path: str, tokenizer: Any, max_tokens: int) -> None:
        self._end_id = end_id(tokenizer)
        self._path, self._tokenizer, self._max_tokens = path, tokenizer, max_tokens

    def __call__(self, number: int, row: dict[str, Any], reply: str) -> list[int]:
        where = f"{self._path}: row {number}"
        chat = isinstance(row.get(reply), list)
        if chat:
            before = row.get("prompt") or []
            messages = [*(before if isinstance(before, list) else [before]), *row[reply]]
            named = f"{where}: {reply} with its prompt"
            prompt, text = chat_reply(named, messages, self._tokenizer)
        else:
            prompt, text = (text_of(where, row, name) for name in ("prompt", reply))
        ids = [
            *prompt_ids(prompt, self._tokenizer, chat=chat),
            *reply_ids(text, self._tokenizer),
            self._end_id,
        ]
        if len(ids) > self._max_tokens:
            raise ValueError(
                f"{where}: prompt and {reply} have {len(ids)} tokens, more than "
                f"max_tokens {self._max_tokens}; raise it, or leave the row out"
            )
        return ids


def _context(reply: Any) -> Any:
    return reply[:-1] if isinstance(reply, list) else None
