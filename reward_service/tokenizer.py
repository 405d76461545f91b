"""The one way in which every stage and role loads a tokenizer: the same text is the same tokens in all."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load_tokenizer(folder: str | Path) -> Any:
    """The fast tokenizer of a Hugging Face folder, without importing torch. ValueError if none.

    tokenizer.json is taken as it is. AutoTokenizer would build another one from its vocabulary where
    tokenizer_config.json names a class like LlamaTokenizer, and lose e.g. the spaces of a byte-level one.
    """
    if not (Path(folder) / "tokenizer.json").is_file():
        raise ValueError(
            f"{folder}: no tokenizer.json; give a Hugging Face folder with a fast tokenizer"
        )
    from transformers.tokenization_utils_fast import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(str(folder))
    except Exception as error:  # tokenizers raises bare Exception on a file it cannot read
        raise ValueError(
            f"{folder}: its tokenizer cannot be read ({error}); copy it again"
        ) from None


def prompt_ids(text: str, tokenizer: Any, *, chat: bool = False) -> list[int]:
    """Special tokens of the tokenizer come with the prompt, but not twice: a chat template has written
    its own, also into a text that begins with the beginning-of-sequence token."""
    written = chat or (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    ids: list[int] = tokenizer(text, add_special_tokens=not written).input_ids
    return ids


def reply_ids(text: str, tokenizer: Any) -> list[int]:
    """What a generator would have sampled after the prompt, without the end of the sequence."""
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def end_id(tokenizer: Any) -> int:
    """The end-of-sequence token's; ValueError if there is none."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{tokenizer.name_or_path}: tokenizer without end-of-sequence token; set eos_token"
        )
    return int(tokenizer.eos_token_id)
