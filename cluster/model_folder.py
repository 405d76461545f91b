"""What a Hugging Face folder must be, told from its config and tokenizer, never its weights.

Each refusal is a ValueError of one line: what, where, the fix.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from actors.config import GeneratorsConfig
from learner.model_limits import check_rope, refuse_inexact
from reward_service.tokenizer import load_tokenizer
from reward_service.weight_names import check_weights

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


def policy_config(folder: str, key: str, *, head: bool = True) -> dict[str, Any]:
    """`model_config` of a model that the learner trains or compares with: it must compute it exactly,
    and find all its weights. `head`: as a language model, not as a critic."""
    config = model_config(folder, key)
    refuse_inexact(f"{key}: {folder}", config)
    check_weights(f"{key}: {folder}", folder, config, head=head)
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
    check_weights(f"{key}: {folder}", folder, config, head=False)


def check_longest(folder: str, key: str, of: str, longest: int) -> None:
    """ValueError if a model that learns is not exact for as many tokens as the config's key `of` allows."""
    check_rope(f"{key}: {folder}", model_config(folder, key), of, longest)


def same_vocabulary(policy: str, other: str, key: str, *, scores: bool = False) -> None:
    """ValueError unless both folders' tokenizers have the same tokens under the same ids and cut a text
    into the same ones. `scores`: a reward model, which has learned where sequences begin and end, too;
    a base model may well be the reference of a chat model, with its other end of a turn."""
    model_config(other, key)
    ours, theirs = load_tokenizer(policy), load_tokenizer(other)
    if (difference := _difference(ours, theirs, ends=scores)) is not None:
        raise ValueError(
            f"{key}: {other}: its tokenizer is not the policy's ({difference}); give a model with the "
            f"tokenizer of {policy}"
        )


def _difference(ours: Any, theirs: Any, *, ends: bool) -> str | None:
    """Of two tokenizers, in words; None if there is none. `ends`: the tokens around a text count, too."""
    entries, others = ours.get_vocab(), theirs.get_vocab()
    if entries != others:
        differing = len(set(entries.items()) ^ set(others.items()))
        return f"{differing} entries differ, {len(others)} against {len(entries)} tokens"
    for text in SAMPLES:
        ids, given = (one(text, add_special_tokens=ends).input_ids for one in (ours, theirs))
        if ids != given:
            return f"{text!r} is {_first(given)} there, {_first(ids)} here"
    if ends and ours.eos_token_id != theirs.eos_token_id:
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
