"""Reads what a reward model is trained and normalised on, as token ids.

Rows are texts, or conversations: lists of role and content. Of a conversation the last message, the
assistant's, is the reply, and all before it the prompt, which may also stand in a column of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from reward_service.chat import chat_prompt, is_message
from reward_service.rows import read_rows


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
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"{tokenizer.name_or_path}: tokenizer without end-of-sequence token; set eos_token"
            )
        self._path, self._tokenizer, self._max_tokens = path, tokenizer, max_tokens

    def __call__(self, number: int, row: dict[str, Any], reply: str) -> list[int]:
        where = f"{self._path}: row {number}"
        if isinstance(row.get(reply), list):
            prompt, text = self._conversation(where, row, reply)
            prompt_ids = self._tokenizer(prompt, add_special_tokens=False).input_ids
        else:
            for name in ("prompt", reply):
                if not isinstance(row.get(name), str):
                    kind = type(row.get(name)).__name__
                    raise ValueError(f"{where}: {name} is {kind}, not text; correct it")
            prompt_ids, text = self._tokenizer(row["prompt"]).input_ids, row[reply]
        ids = [
            *prompt_ids,
            *self._tokenizer(text, add_special_tokens=False).input_ids,
            self._tokenizer.eos_token_id,
        ]
        if len(ids) > self._max_tokens:
            raise ValueError(
                f"{where}: prompt and {reply} have {len(ids)} tokens, more than "
                f"max_tokens {self._max_tokens}; raise it, or leave the row out"
            )
        return ids

    def _conversation(self, where: str, row: dict[str, Any], reply: str) -> tuple[str, str]:
        """The prompt as the chat template has it, and the reply."""
        before = row.get("prompt") or []
        messages = [*(before if isinstance(before, list) else [before]), *row[reply]]
        if len(messages) < 2 or not all(map(is_message, messages)):
            raise ValueError(
                f"{where}: {reply} with its prompt is no list of role and content objects; correct it"
            )
        *context, last = messages
        if last["role"] != "assistant":
            raise ValueError(
                f"{where}: {reply} does not end with the assistant's message; correct it"
            )
        if not getattr(self._tokenizer, "chat_template", None):
            raise ValueError(
                f"{where}: {reply} is a conversation, but the tokenizer has no chat template; use texts"
            )
        return chat_prompt(where, context, self._tokenizer), last["content"]


def _context(reply: Any) -> Any:
    return reply[:-1] if isinstance(reply, list) else None
