"""Checks everything that can be checked before anything is loaded, and tells the plan.

`check_inputs` reads configs, tokenizers and data, never weights. Each refusal is a BadInput of one line:
what, where, the fix. `train` runs it first; `raylign doctor` runs it alone and prints what it found.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.config import PromptsConfig
from actors.prompts import load_prompts, load_tokenizer
from actors.trajectory import Prompt
from cluster.config import BadInput, RunConfig
from cluster.disk import check_disk, free_bytes
from cluster.redaction import hide
from learner.model_limits import refuse_dropout
from reward_service.config import (
    FunctionScorerConfig,
    HttpScorerConfig,
    RewardModelScorerConfig,
    ScorerConfig,
    SumScorerConfig,
)


@dataclass(frozen=True)
class Inputs:
    """What was read while checking, so that it is read once."""

    tokenizer: Any
    vocabulary_size: int
    prompts: list[Prompt]
    dropped: list[str]  # prompt_ids too long for the context
    held_out: list[Prompt]
    num_parameters: int  # estimated from the config; 0 if it does not say


def check_inputs(config: RunConfig) -> Inputs:
    """Raises BadInput, or returns what the run starts from."""
    try:
        model = policy_config(config.policy, "policy")
        tokenizer = load_tokenizer(config.policy)
        _check_tokenizer(config.policy, tokenizer, model)
        _check_context(config, model)
        if config.reference is not None:
            policy_config(config.reference, "reference")
            same_vocabulary(config.policy, config.reference, "reference")
        if config.ppo.value_init is not None:
            policy_config(config.ppo.value_init, "ppo.value_init")
            same_vocabulary(config.policy, config.ppo.value_init, "ppo.value_init")
        check_scorer(config.reward.scorer, config.policy, "reward.scorer")
        prompts, dropped = _prompts(config, config.prompts, tokenizer)
        held_out: list[Prompt] = []
        if config.evaluation is not None:
            check_scorer(config.evaluation.scorer, config.policy, "evaluation.scorer")
            held_out, _ = _prompts(config, config.evaluation.prompts, tokenizer)
        if config.ppo.ptx is not None and not Path(config.ppo.ptx.path).is_file():
            raise ValueError(f"ppo.ptx.path: {config.ppo.ptx.path}: no such file; correct the path")
    except ValueError as error:
        raise BadInput(str(error)) from None
    if config.device == "cpu" and config.generators.kv_cache_bytes is None:
        raise BadInput(
            "generators.kv_cache_bytes: needed on CPU, where vLLM would take nearly all memory; "
            "try 67108864"
        )
    num_parameters = estimate_parameters(model)
    check_disk(config.run_dir, checkpoint_bytes(config, num_parameters))
    return Inputs(tokenizer, model["vocab_size"], prompts, dropped, held_out, num_parameters)


def check_gpus(wanted: Mapping[str, float], available: Callable[[], float]) -> None:
    """BadInput if the roles, by the keys that say how many, ask for more GPUs than there are."""
    total = sum(wanted.values())
    if total and total > (found := available()):
        parts = ", ".join(f"{number:g} for {key}" for key, number in wanted.items())
        raise BadInput(
            f"device: cuda needs {total:g} GPUs ({parts}), the cluster has {found:g}; lower the "
            "counts or add nodes"
        )


def gpus_of(config: RunConfig) -> dict[str, float]:
    """How many GPUs the roles of a run take, by the key that says so."""
    if config.device == "cpu":
        return {}
    generators = config.generators.count * config.generators.tensor_parallel_size
    return {
        "generators": generators,
        "learner.ranks": config.learner.ranks,
        "reward.num_gpus": config.reward.num_gpus,
    }


# What a checkpoint is of: changed, it would be another run.
FIXED_ON_RESUME = (
    "seed",
    "batch_size",
    "max_staleness",
    "policy",
    "reference",
    "prompts",
    "sampling",
)
FIXED_IN_PPO = ("advantage", "value_model", "value_init")


def check_resume(config: RunConfig, saved: dict[str, Any]) -> None:
    """BadInput if the checkpoint is of a run that these settings do not continue."""
    now = config.model_dump(mode="json")
    pairs = [(key, saved[key], now[key]) for key in FIXED_ON_RESUME]
    pairs += [(f"ppo.{key}", saved["ppo"][key], now["ppo"][key]) for key in FIXED_IN_PPO]
    for key, was, given in pairs:
        if was != given:
            raise BadInput(
                f"{key}: the checkpoint was made with {was!r}, the config says {given!r}; put it back, "
                "or start another run with name=..."
            )


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


def same_vocabulary(policy: str, other: str, key: str) -> None:
    """ValueError unless both folders' tokenizers have the same tokens under the same ids."""
    model_config(other, key)
    ours, theirs = load_tokenizer(policy).get_vocab(), load_tokenizer(other).get_vocab()
    if ours != theirs:
        differing = len(set(ours.items()) ^ set(theirs.items()))
        raise ValueError(
            f"{key}: {other}: its tokenizer is not the policy's ({differing} entries differ, {len(theirs)} "
            f"against {len(ours)} tokens); give a model with the tokenizer of {policy}"
        )


def check_scorer(config: ScorerConfig, policy: str, key: str) -> None:
    """ValueError if a scorer cannot be made or would misread the policy's tokens."""
    match config:
        case FunctionScorerConfig() | HttpScorerConfig():
            from reward_service.service import build_scorer

            if isinstance(config, HttpScorerConfig) and config.token_env is not None:
                hide(config.token_env)
            try:
                build_scorer(config)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
        case RewardModelScorerConfig():
            model_config(config.path, key)
            if config.input == "tokens":
                same_vocabulary(policy, config.path, key)
        case SumScorerConfig():
            for name, part in config.parts.items():
                check_scorer(part.scorer, policy, f"{key}.{name}")


def plan_lines(config: RunConfig, inputs: Inputs) -> list[str]:
    """Who runs where, the arithmetic of a step, and what memory the weights take."""
    count, ranks = config.generators.count, config.learner.ranks
    per_rank = inputs.num_parameters * (16 * _num_trained(config) + 4) / ranks
    push = inputs.num_parameters * (4 if config.generators.dtype == "float32" else 2)
    free = free_bytes(config.run_dir)
    epochs = config.num_steps * config.prompts_per_step / len(inputs.prompts)
    ppo, generators = config.ppo, config.generators
    staleness = config.max_staleness
    mode = f"asynchronous, staleness at most {staleness}" if staleness else "synchronous"
    return [
        f"prompts     {len(inputs.prompts)} ({len(inputs.dropped)} too long and dropped), "
        f"{epochs:.2f} epochs in {config.num_steps} steps",
        f"step        {config.prompts_per_step} prompts x {config.sampling.samples_per_prompt} = "
        f"{config.batch_size} trajectories; {ppo.epochs} epochs x {ppo.minibatches} minibatches "
        f"of {config.batch_size // ppo.minibatches}",
        f"generators  {count} x vLLM on {generators.tensor_parallel_size} {config.device} each, "
        f"{generators.dtype}, {generators.max_num_seqs} completions together",
        f"learner     {ranks} x FSDP on {config.device}, {config.learner.dtype}; weights, gradients "
        f"and AdamW about {per_rank / 2**20:,.0f} MiB a rank, activations not counted",
        f"mode        {mode}; anchor {ppo.anchor}; {push / 2**20:,.1f} MiB a weight push",
        f"disk        {free / 2**30:,.0f} GiB free for {config.run_dir}; a checkpoint takes about "
        f"{checkpoint_bytes(config, inputs.num_parameters) / 2**20:,.0f} MiB, "
        f"{config.checkpoint.keep} are kept",
        f"machine     {os.cpu_count()} cores, {_memory() / 2**30:,.0f} GiB",
    ]


def estimate_parameters(model: dict[str, Any]) -> int:
    """From the sizes in config.json; dense decoder layers with a gated MLP assumed."""
    try:
        d, layers, mlp = (
            model["hidden_size"],
            model["num_hidden_layers"],
            model["intermediate_size"],
        )
        heads = model["num_attention_heads"]
        kv = model.get("num_key_value_heads", heads) * model.get("head_dim", d // heads)
        embeddings = model["vocab_size"] * d * (1 if model.get("tie_word_embeddings") else 2)
    except KeyError:
        return 0
    return embeddings + layers * (2 * d * d + 2 * d * kv + 3 * d * mlp)


def checkpoint_bytes(config: RunConfig, num_parameters: int) -> int:
    """An estimate: weights and AdamW's two moments in float32, and a margin."""
    return num_parameters * 14 * _num_trained(config)


def _num_trained(config: RunConfig) -> int:
    """Models of the policy's size that are trained."""
    return 2 if config.ppo.uses_critic and config.ppo.value_model == "separate" else 1


def _prompts(
    config: RunConfig, prompts: PromptsConfig, tokenizer: Any
) -> tuple[list[Prompt], list[str]]:
    room = config.generators.max_model_len - config.sampling.max_tokens
    return load_prompts(prompts, tokenizer, room)


def _check_tokenizer(folder: str, tokenizer: Any, model: dict[str, Any]) -> None:
    if len(tokenizer) > model["vocab_size"]:
        raise ValueError(
            f"policy: {folder}: its tokenizer has {len(tokenizer)} tokens, its model {model['vocab_size']}; "
            "give a model with its own tokenizer"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"policy: {folder}: its tokenizer has no eos_token; completions could not end"
        )


def _check_context(config: RunConfig, model: dict[str, Any]) -> None:
    longest = model.get("max_position_embeddings")
    if longest is not None and config.generators.max_model_len > longest:
        raise ValueError(
            f"generators.max_model_len: {config.generators.max_model_len} is above the policy's "
            f"max_position_embeddings {longest}; lower it"
        )


def _memory() -> int:
    import psutil

    return psutil.virtual_memory().total
