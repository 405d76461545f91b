"""Whether a Hugging Face folder holds the weights that its config asks for.

transformers fills what is missing with random numbers and goes on. `check_weights` reads only the names
in the safetensors' headers, before any model is loaded; `pretrained` has the loader's own word. Imports
nothing heavy.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
# What wrappers put before each name: DistributedDataParallel, torch.compile, PEFT.
WRAPPERS = ("module.", "_orig_mod.", "base_model.model.", "_fsdp_wrapped_module.")
LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")
MOST_HEADER_BYTES = 100_000_000  # as the format itself allows


def check_weights(where: str, folder: str, settings: Mapping[str, Any], *, head: bool) -> None:
    """ValueError if the names alone show that weights are missing. `settings`: config.json; `head`:
    the language model's output matrix is needed too."""
    names = _names(where, Path(folder))
    for wrapper in WRAPPERS:
        if wrapped := sorted(name for name in names if name.startswith(wrapper)):
            raise ValueError(
                f"{where}: its weights are named {wrapped[0]}, as a wrapper saved them; take "
                f"{wrapper!r} off the names, or save the model inside the wrapper"
            )
    found = {int(match[1]) for name in names if (match := LAYER.search(name))}
    layers = settings.get("num_hidden_layers")
    if found and isinstance(layers, int) and (absent := sorted(set(range(layers)) - found)):
        raise ValueError(
            f"{where}: its weights lack layer {absent[0]} of {layers}, which would be random; copy "
            "the model again"
        )
    by_ends = {name.rpartition("model.")[2] for name in names}
    untied = settings.get("tie_word_embeddings") is False
    if head and untied and "embed_tokens.weight" in by_ends and "lm_head.weight" not in by_ends:
        raise ValueError(
            f"{where}: its weights lack lm_head.weight, which would be random; give a language model "
            "(this is the trunk of one, or a reward model)"
        )


def pretrained(
    kind: Any, folder: str, *, give: str, new: Collection[str] = (), **options: Any
) -> Any:
    """`kind`.from_pretrained with all weights from the folder's safetensors and none of its Python.

    ValueError, whose fix is to give the folder of `give`, if there are none for something; what is tied
    to a weight that is there is not missing, nor is what is `new`, which the caller fills.
    """
    model, loading = kind.from_pretrained(
        folder, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options
    )
    missing, given = sorted({*loading["missing_keys"]} - {*new}), sorted(loading["unexpected_keys"])
    if missing:
        named = next((name for name in given if name.endswith(f".{missing[0]}")), None)
        instead = f" (there is {named})" if named else ""
        raise ValueError(
            f"{folder}: the weights lack {missing[0]}{instead}, {len(missing)} in all, which would be "
            f"random; give the folder of {give}"
        )
    return model


def _names(where: str, folder: Path) -> set[str]:
    """Of the weights that transformers would read."""
    files = sorted(folder.glob("*.safetensors"))
    if (whole := folder / "model.safetensors").is_file():
        files = [whole]
    elif (index := folder / INDEX).is_file():
        files = sorted({folder / str(name) for name in _shards(where, index)})
    return {name for file in files for name in _header(where, file)}


def _shards(where: str, index: Path) -> Collection[Any]:
    try:
        return set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{where}: {INDEX} names no weights; copy the model again") from None


def _header(where: str, path: Path) -> Collection[str]:
    """A safetensors file begins with the length of its header, 8 bytes, and the header, JSON."""
    if not path.is_file():
        raise ValueError(
            f"{where}: no {path.name} there, which {INDEX} names; copy the model again"
        )
    with path.open("rb") as file:
        start = file.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else MOST_HEADER_BYTES
        text = file.read(size) if size < MOST_HEADER_BYTES else b""
    try:
        header = dict(json.loads(text))
    except (ValueError, TypeError):
        raise ValueError(
            f"{where}: {path.name} is no safetensors file; copy the model again"
        ) from None
    return header.keys() - {"__metadata__"}
