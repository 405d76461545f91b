"""Conversations as a model's chat template has them: in prompts, supervised rows and preference pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(
        isinstance(message.get(key), str) for key in ("role", "content")
    )


def chat_prompt(where: str, messages: Sequence[Any], tokenizer: Any) -> str:
    """The text that the next message of the assistant's goes on with. ValueError, with `where`, if the
    template refuses the messages."""
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
        return text
    except Exception as error:  # the template is a program of the model's
        raise ValueError(f"{where}: refused by the chat template ({error}); correct it") from None
