"""What a Hugging Face folder must be, told from its config and tokenizer, never its weights.

Each refusal is a ValueError of one line: what, where, the fix.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from actors.config import GeneratorsConfig
from learner.model_limits import refuse_dropout
from reward_service.tokenizer import load_tokenizer

# Texts on which tokenizers of one vocabulary come apart: spaces, capitals, digits, other scripts.
SAMPLES = ("Hello world, the fox", "  Two  spaces\n\tand 1234.5", "naïve Ünïcode: 日本語 🙂")


def model_config(folder: str, key: str) -> dict[str, Any]:
    """config.json of a Hugging Face folder; ValueError if the folder is none."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{key}: {folder}: no config.json there; give a Hugging Face folder (did the stage "
            "before run?)"
        )
    if not any(Path(folder).glob("*.safetensors")):
        raise ValueError(f"{key}: {folder}: no .safetensors there; raylign loads no other weights")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{key}: {path}: not JSON ({error}); copy the model again") from None
    if not isinstance(config, dict) or not isinstance(config.get("vocab_size"), int):
        raise ValueError(f"{key}: {path}: no vocab_size in it; give a text-only causal model")
    return config


def policy_config(folder: str, key: str) -> dict[str, Any]:
    """`model_config` of a model that the learner trains or compares with: it must compute it exactly."""
    config = model_config(folder, key)
    refuse_dropout(f"{key}: {folder}", config)
    return config


def check_reward_model(folder: str, key: str) -> None:
    """ValueError of a model that says it is something else. One label is what it must have; a config that
    tells no number has two of them."""
    config = model_config(folder, key)
    kinds = [kind for kind in config.get("architectures") or () if isinstance(kind, str)]
    other = [kind for kind in kinds if "SequenceClassification" not in kind]
    labels = len(config.get("id2label") or range(config.get("num_labels") or 2))
    if other or labels != 1:
        what = other[0] if other else f"a classifier of {labels} labels"
        raise ValueError(
            f"{key}: {folder}: {what} is no reward model; train one from it with `raylign reward-model`"
        )


def same_vocabulary(policy: str, other: str, key: str) -> None:
    """ValueError unless both folders' tokenizers have the same tokens under the same ids, cut a text into
    the same ones, and end it with the same."""
    model_config(other, key)
    ours, theirs = load_tokenizer(policy), load_tokenizer(other)
    if (difference := _difference(ours, theirs)) is not None:
        raise ValueError(
            f"{key}: {other}: its tokenizer is not the policy's ({difference}); give a model with the "
            f"tokenizer of {policy}"
        )


def _difference(ours: Any, theirs: Any) -> str | None:
    """Of two tokenizers, in words; None if there is none."""
    entries, others = ours.get_vocab(), theirs.get_vocab()
    if entries != others:
        differing = len(set(entries.items()) ^ set(others.items()))
        return f"{differing} entries differ, {len(others)} against {len(entries)} tokens"
    for text in SAMPLES:
        if (ids := ours(text).input_ids) != (given := theirs(text).input_ids):
            return f"{text!r} is {_first(given)} there, {_first(ids)} here"
    if ours.eos_token_id != theirs.eos_token_id:
        return f"eos_token is {theirs.eos_token!r} there, {ours.eos_token!r} here"
    return None


def _first(ids: list[int]) -> str:
    return f"{ids[:8]}"[:-1] + (", ...]" if len(ids) > 8 else "]")


def check_tokenizer(folder: str, tokenizer: Any, model: dict[str, Any]) -> None:
    if len(tokenizer) > model["vocab_size"]:
        raise ValueError(
            f"policy: {folder}: its tokenizer has {len(tokenizer)} tokens, its model {model['vocab_size']}; "
            "give a model with its own tokenizer"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"policy: {folder}: its tokenizer has no eos_token; completions could not end"
        )


def check_context(generators: GeneratorsConfig, model: dict[str, Any]) -> None:
    longest = model.get("max_position_embeddings")
    if longest is not None and generators.max_model_len > longest:
        raise ValueError(
            f"generators.max_model_len: {generators.max_model_len} is above the policy's "
            f"max_position_embeddings {longest}; set it to {longest} or less"
        )


def check_positions(folder: str, key: str, longest: int) -> None:
    """ValueError if a model that reads the policy's tokens has no place for `longest` of them."""
    positions = model_config(folder, key).get("max_position_embeddings")
    if positions is not None and longest > positions:
        raise ValueError(
            f"{key}: {folder}: max_position_embeddings is {positions}, a prompt and its completion may "
            f"have {longest} tokens; lower sampling.max_tokens by {longest - positions}"
        )


def check_heads(generators: GeneratorsConfig, model: dict[str, Any]) -> None:
    """vLLM gives each GPU of an engine equally many heads."""
    given, heads = generators.tensor_parallel_size, model.get("num_attention_heads", 0)
    keys = model.get("num_key_value_heads") or heads

    def divides(size: int) -> bool:
        return heads % size == 0 and max(keys, size) % min(keys, size) == 0

    if heads and not divides(given):
        nearest = next(size for size in range(min(given, heads), 0, -1) if divides(size))
        raise ValueError(
            f"generators.tensor_parallel_size: {given} does not divide the policy's {heads} attention "
            f"heads ({keys} of keys and values); nearest: {nearest}"
        )
