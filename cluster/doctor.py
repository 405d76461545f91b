"""Checks everything that can be checked before anything is loaded.

`check_inputs` reads configs, tokenizers and data, never weights. Each refusal is a BadInput of one line:
what, where, the fix. `train` runs it first; `raylign doctor` runs it alone and prints the plan (plan.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from actors.config import PromptsConfig
from actors.prompts import digest_of, load_prompts
from actors.trajectory import Prompt
from cluster.config import BadInput, RunConfig
from cluster.disk import check_disk
from cluster.fit import check_fit
from cluster.memory import checkpoint_bytes
from cluster.model_folder import (
    check_context,
    check_heads,
    check_longest,
    check_positions,
    check_reward_model,
    check_tokenizer,
    policy_config,
    same_vocabulary,
)
from cluster.redaction import hide
from cluster.shapes import Shape, read_shapes, reward_models
from cluster.versions import check_versions
from learner.supervised_rows import load_supervised
from reward_service.chat import chat_prompt
from reward_service.config import (
    FunctionScorerConfig,
    HttpScorerConfig,
    RewardModelScorerConfig,
    ScorerConfig,
    SumScorerConfig,
)
from reward_service.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Inputs:
    """What was read while checking, so that it is read once."""

    tokenizer: Any
    vocabulary_size: int
    prompts: list[Prompt]
    dropped: list[str]  # prompt_ids too long for the context
    held_out: list[Prompt]
    num_parameters: int  # estimated from the config; 0 if it does not say
    too_little_memory: str = ""  # a warning


def check_inputs(config: RunConfig) -> Inputs:
    """Raises BadInput, or returns what the run starts from."""
    check_versions()
    try:
        inputs = _read(config)
    except ValueError as error:
        raise BadInput(str(error)) from None
    if config.device == "cpu" and config.generators.kv_cache_bytes is None:
        raise BadInput(
            "generators.kv_cache_bytes: needed on CPU, where vLLM would take nearly all memory; "
            "try 67108864"
        )
    needed = checkpoint_bytes(config, inputs.num_parameters)
    check_disk(config.run_dir, needed, config.checkpoint.keep)
    if (shapes := read_shapes(config)) is not None:
        said = check_fit(config, shapes, longest_sequence(config, inputs))
        return replace(inputs, too_little_memory=said)
    return inputs


def longest_sequence(config: RunConfig, inputs: Inputs) -> int:
    """Tokens of the longest prompt with the longest completion."""
    prompts = [*inputs.prompts, *inputs.held_out]
    return max(len(prompt.ids) for prompt in prompts) + config.sampling.max_tokens


def _read(config: RunConfig) -> Inputs:
    """ValueError for what cannot be used."""
    model = policy_config(config.policy, "policy")
    tokenizer = load_tokenizer(config.policy)
    check_tokenizer(config.policy, tokenizer, model)
    check_context(config.generators, model)
    check_heads(config.generators, model)
    length = ("generators.max_model_len", config.generators.max_model_len)
    check_longest(config.policy, "policy", *length)
    for folder, key in _companions(config):
        check_longest(folder, key, *length)
        policy_config(folder, key, head=key == "reference")
        same_vocabulary(config.policy, folder, key)
    check_scorer(config.reward.scorer, config.policy, "reward.scorer")
    prompts, dropped = _prompts(config, config.prompts, tokenizer)
    _check_messages("reward.scorer", config.reward.scorer, config.prompts.path, prompts)
    held_out: list[Prompt] = []
    if config.evaluation is not None:
        check_scorer(config.evaluation.scorer, config.policy, "evaluation.scorer")
        given = config.evaluation.prompts
        held_out, _ = _prompts(config, given, tokenizer)
        _check_messages("evaluation.scorer", config.evaluation.scorer, given.path, held_out)
    if config.ppo.ptx is not None:
        _check_ptx(config.ppo.ptx.path, config.learner.max_tokens_per_microbatch, tokenizer)
    shape = Shape.of(model)
    num_parameters = shape.parameters if shape is not None else 0
    inputs = Inputs(tokenizer, model["vocab_size"], prompts, dropped, held_out, num_parameters)
    _check_positions(config, longest_sequence(config, inputs))
    return inputs


def _check_ptx(path: str, max_tokens: int, tokenizer: Any) -> None:
    """Read all that the learner will read, so that what it would refuse is refused now."""
    try:
        load_supervised(path, tokenizer, max_tokens, key="learner.max_tokens_per_microbatch")
    except ValueError as error:
        raise ValueError(f"ppo.ptx.path: {error}") from None


def _companions(config: RunConfig) -> Iterator[tuple[str, str]]:
    """(folder, key) of the models that learn beside the policy or are compared with it."""
    if config.reference is not None:
        yield config.reference, "reference"
    if config.ppo.value_init is not None:
        yield config.ppo.value_init, "ppo.value_init"


def _check_positions(config: RunConfig, longest: int) -> None:
    for folder, key in _companions(config):
        check_positions(folder, key, longest)
    scorers = {"reward.scorer": config.reward.scorer}
    if config.evaluation is not None:
        scorers["evaluation.scorer"] = config.evaluation.scorer
    for key, scorer in scorers.items():
        for model in reward_models(scorer):
            if model.input == "tokens":
                check_positions(model.path, key, longest)


def _check_messages(key: str, scorer: ScorerConfig, path: str, prompts: list[Prompt]) -> None:
    """ValueError if a reward model shall read conversations that are none, or that its template refuses."""
    for model in reward_models(scorer):
        if model.input != "messages":
            continue
        tokenizer = load_tokenizer(model.path)
        for prompt in prompts:
            where = f"{key}: {path}: {prompt.prompt_id}"
            if prompt.messages is None:
                raise ValueError(
                    f"{where} has no messages, which {model.path} shall read; give it a column messages, "
                    "or set input: text"
                )
            chat_prompt(f"{where}: messages", prompt.messages, tokenizer)


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
# A win-rate is over the policy at the start, sampled and judged the same way. None may be left out.
FIXED_IN_EVALUATION = ("prompts", "scorer", "num_samples", "temperature")


def check_resume(config: RunConfig, saved: dict[str, Any]) -> None:
    """BadInput if the checkpoint is of a run that these settings do not continue."""
    now = config.model_dump(mode="json")
    pairs = [(key, saved[key], now[key]) for key in FIXED_ON_RESUME]
    pairs += [(f"ppo.{key}", saved["ppo"][key], now["ppo"][key]) for key in FIXED_IN_PPO]
    if (evaluation := now["evaluation"]) is not None:
        before = saved["evaluation"] or dict.fromkeys(FIXED_IN_EVALUATION)
        pairs += [
            (f"evaluation.{key}", before[key], evaluation[key]) for key in FIXED_IN_EVALUATION
        ]
    for key, was, given in pairs:
        if was != given:
            raise BadInput(
                f"{key}: the checkpoint was made with {was!r}, the config says {given!r}; put it back, "
                "or start another run with name=..."
            )


def check_same_prompts(config: RunConfig, prompts: list[Prompt], state: dict[str, Any]) -> None:
    """BadInput if the cursor of the checkpoint with this driver's state counts other prompts: some would
    be trained again, others never. A checkpoint without their digest is older than that."""
    digest = digest_of(prompts)
    if state.get("prompts_digest", digest) != digest:
        raise BadInput(
            f"prompts: {config.prompts.path}: the prompts that are kept of it, now {len(prompts)}, are not "
            "those that the checkpoint was made with; put the file, its tokenizer and "
            "generators.max_model_len back, or start another run with name=..."
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
            if config.input == "tokens":
                same_vocabulary(policy, config.path, key, scores=True)
            check_reward_model(config.path, key)
            if config.input == "text":
                load_tokenizer(config.path)
        case SumScorerConfig():
            for name, part in config.parts.items():
                check_scorer(part.scorer, policy, f"{key}.{name}")


def _prompts(
    config: RunConfig, prompts: PromptsConfig, tokenizer: Any
) -> tuple[list[Prompt], list[str]]:
    room = config.generators.max_model_len - config.sampling.max_tokens
    return load_prompts(prompts, tokenizer, room)
