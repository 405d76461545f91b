"""The config of each stage, composed of the components' own, with the checks that span them.

Imports nothing heavy: a mistake is refused in well under a second.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal, NamedTuple, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from actors.config import GeneratorsConfig, PromptsConfig, SamplingConfig
from learner.config import LearnerConfig, PPOConfig, SFTConfig
from reward_service.config import (
    RewardServiceConfig,
    RewardTrainingConfig,
    ScorerConfig,
    StrictModel,
    SumPartConfig,
)

SumPartConfig.model_rebuild()  # names ScorerConfig before that exists; known_keys reads its fields


class BadInput(Exception):
    """What the user gave cannot be run. The message is one line: what, where, the fix. Exit code 2."""


class EvaluationConfig(StrictModel):
    """Held-out prompts, sampled and scored by a judge of their own. The judge compares with the
    completions of the starting policy: `win_rate` is against these, a tie counts half."""

    prompts: PromptsConfig
    scorer: ScorerConfig
    every: PositiveInt | None = None  # steps; None: before the first and after the last only
    temperature: float = Field(default=1.0, ge=0)  # 0: greedy
    num_samples: PositiveInt | None = None  # prompts are repeated up to it; default: each once
    show: PositiveInt = 4  # prompts whose completions are printed before and after


class CheckpointConfig(StrictModel):
    every: PositiveInt = 10  # steps; the last step is always saved
    keep: PositiveInt = 2


class SelfCheckConfig(StrictModel):
    """Bounds on |generator logprob - learner logprob|: at start on sampled tokens, and on the probe
    after each push. Those not given follow from the dtypes (RunConfig.bounds)."""

    max_mean_difference: PositiveFloat | None = None
    max_difference: PositiveFloat | None = None
    probe: PositiveFloat | None = None


class Bounds(NamedTuple):
    """What holds of SelfCheckConfig's."""

    max_mean_difference: float
    max_difference: float
    probe: float


# bfloat16 rounds differently on the two sides: there the digests alone prove the weights to the bit, and
# these find what is grossly wrong.
BOUNDS = {"float32": Bounds(1e-4, 1e-2, 1e-4), "bfloat16": Bounds(0.05, 1.0, 1.0)}


class WarnConfig(StrictModel):
    # Nats a completion: above it, with a rising score, a warning is printed.
    kl_to_ref: PositiveFloat = 8.0


class StageConfig(StrictModel):
    """What every stage has."""

    stage: str  # first, so that a file of another kind is told so before anything else
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    runs_dir: str = "runs"
    seed: int = Field(default=0, ge=0)
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name


class LearnerStageConfig(StageConfig):
    """What the stages with an FSDP learner, and so with a Ray, have."""

    # None: a Ray of its own (or the job's); "auto" or host:port: join that one
    ray_address: str | None = None
    num_steps: PositiveInt
    learner: LearnerConfig = LearnerConfig()

    @model_validator(mode="after")
    def _check_offload(self) -> Self:
        if self.learner.cpu_offload and self.device == "cpu":
            raise ValueError(
                "learner.cpu_offload: with device cpu there is no GPU to offload from; leave it out"
            )
        return self


class SFTRunConfig(LearnerStageConfig):
    stage: Literal["sft"]
    model: str
    sft: SFTConfig


class RewardRunConfig(StageConfig):
    stage: Literal["reward_model"]
    model: str  # a causal language model: its backbone gets a scalar head
    training: RewardTrainingConfig


class RunConfig(LearnerStageConfig):
    """PPO: the prompts, the generators, the reward and the learner of one run."""

    stage: Literal["train"]
    batch_size: PositiveInt  # trajectories a step
    max_staleness: int = Field(default=0, ge=0)
    # Of an asynchronous run: the same bits whatever the timing. A step takes the oldest prompts and no
    # others, and all that were leased at a version are sampled from it. Costs overlap, not exactness.
    deterministic: bool = False
    policy: str  # Hugging Face folder
    reference: str | None = None  # default: the policy at the start
    trust_remote_code: Literal[False] = False
    prompts: PromptsConfig
    sampling: SamplingConfig
    generators: GeneratorsConfig = GeneratorsConfig()
    reward: RewardServiceConfig
    ppo: PPOConfig = PPOConfig()
    evaluation: EvaluationConfig | None = None
    checkpoint: CheckpointConfig = CheckpointConfig()
    # From a SIGTERM or SIGINT on, for the step at hand and a checkpoint; then the step is abandoned.
    stop_grace_s: PositiveFloat = 120.0
    ping_timeout_s: PositiveFloat = 30.0  # a role that does not answer for so long is stuck
    self_check: SelfCheckConfig = SelfCheckConfig()
    warn: WarnConfig = WarnConfig()
    # Of a run that, by an estimate, needs more memory than there is.
    too_little_memory: Literal["refuse", "warn"] = "refuse"

    @property
    def bounds(self) -> Bounds:
        dtypes = (self.generators.dtype, self.learner.dtype)
        usual = BOUNDS["bfloat16" if "bfloat16" in dtypes else "float32"]
        given = self.self_check.model_dump(exclude_none=True)
        return usual._replace(**given)

    @property
    def prompts_per_step(self) -> int:
        return self.batch_size // self.sampling.samples_per_prompt

    @property
    def judge(self) -> RewardServiceConfig | None:
        """Of the evaluation's own service; None if the reward's scores for it, too, or there is none."""
        if self.evaluation is None or self.evaluation.scorer == self.reward.scorer:
            return None
        return RewardServiceConfig(scorer=self.evaluation.scorer)

    @model_validator(mode="after")
    def _check(self) -> Self:
        samples, minibatches = self.sampling.samples_per_prompt, self.ppo.minibatches
        if self.batch_size % samples:
            raise ValueError(
                f"batch_size: {self.batch_size} is no multiple of sampling.samples_per_prompt {samples}; "
                f"nearest: {self._nearest_batch_size()}"
            )
        if self.batch_size % self.ppo.minibatches:
            raise ValueError(
                f"batch_size: {self.batch_size} is no multiple of ppo.minibatches {minibatches}; "
                f"nearest: {self._nearest_batch_size()}"
            )
        if self.batch_size // self.ppo.minibatches < self.learner.ranks:
            raise ValueError(
                f"ppo.minibatches: {self.batch_size // self.ppo.minibatches} trajectories a minibatch for "
                f"learner.ranks {self.learner.ranks}; each rank needs one: set {self._fewer_parts()}"
            )
        if self.ppo.advantage in ("grpo", "rloo") and samples < 2:
            raise ValueError(
                f"sampling.samples_per_prompt: ppo.advantage {self.ppo.advantage} compares samples of one "
                "prompt; set it to 2 or more"
            )
        if self.generators.weight_memory == "shared" and self.device == "cuda":
            raise ValueError(
                "generators.weight_memory: shared is for engines on CPU; with device cuda leave it out"
            )
        if self.sampling.max_tokens >= self.generators.max_model_len:
            raise ValueError(
                f"sampling.max_tokens: {self.sampling.max_tokens} leaves no room for a prompt in "
                f"generators.max_model_len {self.generators.max_model_len}; raise the latter"
            )
        return self

    def _nearest_batch_size(self) -> int:
        """The nearest batch size that samples, minibatches and ranks divide as they must."""
        minibatches = self.ppo.minibatches
        unit = math.lcm(self.sampling.samples_per_prompt, minibatches)
        least = math.ceil(minibatches * self.learner.ranks / unit)
        return unit * max(least, (2 * self.batch_size + unit - 1) // (2 * unit))

    def _fewer_parts(self) -> str:
        most = self.batch_size // self.learner.ranks
        fitting = [n for n in range(1, most + 1) if self.batch_size % n == 0]
        ranks = f"learner.ranks={self.batch_size // self.ppo.minibatches}"
        return f"ppo.minibatches={fitting[-1]} or {ranks}" if fitting else ranks
