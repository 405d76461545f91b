"""Conversations as a model's chat template has them: in prompts, supervised rows and preference pairs.

Refusals are ValueErrors that begin with `where`, which ends with the name of the column.
"""

from __future__ import annotations

from typing import Any


def conversation(where: str, messages: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """`messages`, where they are such that the tokenizer's chat template will have them."""
    # Checked here, because a template turns nearly anything into some text.
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ValueError(f"{where} is no list of role and content objects; correct it")
    if not tokenizer.chat_template:
        raise ValueError(
            f"{where} is a conversation, but the tokenizer has no chat template; use texts"
        )
    return messages


def chat_prompt(where: str, messages: Any, tokenizer: Any) -> str:
    """The text that the next message of the assistant's goes on with."""
    given = conversation(where, messages, tokenizer)
    try:
        text: str = tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True)
        return text
    except Exception as error:  # the template is a program of the model's
        raise ValueError(f"{where} is refused by the chat template ({error}); correct it") from None


def chat_reply(where: str, messages: Any, tokenizer: Any) -> tuple[str, str]:
    """Cut before the last message, the assistant's: the prompt before it, and its text."""
    *context, last = conversation(where, messages, tokenizer)
    if not context or last["role"] != "assistant":
        raise ValueError(
            f"{where} must hold a context and end with the assistant's message; correct it"
        )
    return chat_prompt(where, context, tokenizer), last["content"]


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(
        isinstance(message.get(key), str) for key in ("role", "content")
    )
