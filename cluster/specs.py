"""RunConfig -> what each role is told: its own part, paths made absolute, and nothing else."""

from __future__ import annotations

import math
from pathlib import Path

from actors.rollout_worker import Scoring
from actors.weight_update import Probe
from cluster.config import RunConfig
from cluster.doctor import Inputs
from cluster.roles import RolloutSpec
from learner.learner_spec import LearnerSpec


def rollout_spec(config: RunConfig, name: str, logs: Path) -> RolloutSpec:
    return RolloutSpec(
        name=name,
        model=str(Path(config.policy).resolve()),
        generators=config.generators,
        sampling=config.sampling,
        reward=config.reward,
        max_batches=_max_batches(config),
        probe_bound=config.bounds.probe,
        seed=config.seed,
        scoring=_scoring(config),
        finish_all=config.deterministic,
        log_file=logs / f"{name}.log",
    )


def _max_batches(config: RunConfig) -> int:
    """All that may be out at once; a prompt's samples may be a call of their own, of a batch not full."""
    prompts = config.prompts_per_step * (1 + config.max_staleness)
    return prompts * math.ceil(config.sampling.samples_per_prompt / config.reward.batch_size)


def _scoring(config: RunConfig) -> Scoring:
    if config.max_staleness == 0:
        return "together"
    return "each" if config.deterministic else "gathered"


def learner_spec(config: RunConfig, inputs: Inputs) -> LearnerSpec:
    policy = str(Path(config.policy).resolve())
    init, ptx = config.ppo.value_init, config.ppo.ptx
    paths = {
        "value_init": str(Path(init).resolve()) if init else None,
        "ptx": ptx.model_copy(update={"path": str(Path(ptx.path).resolve())}) if ptx else None,
    }
    ppo = config.ppo.model_copy(update=paths)
    return LearnerSpec(
        policy=policy,
        reference=str(Path(config.reference).resolve()) if config.reference else policy,
        ppo=ppo,
        learner=config.learner,
        seed=config.seed,
        num_steps=config.num_steps,
        push_dtype=config.generators.dtype,
        probe=Probe.of(inputs.vocabulary_size, set(inputs.tokenizer.all_special_ids)),
        push_delta=config.generators.weight_push == "delta",
    )
