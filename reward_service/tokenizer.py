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
