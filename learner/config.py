"""Configuration of the FSDP learner, of PPO and of SFT. Imports nothing heavy."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from reward_service.config import StrictModel

CRITIC_FREE = ("grpo", "rloo", "reinforce++")


class OptimizerConfig(StrictModel):
    """AdamW, gradient clipping, and a schedule over the run's steps."""

    lr: PositiveFloat
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    decay: Literal["constant", "linear", "cosine"] = "linear"
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    max_grad_norm: PositiveFloat = 1.0


# More at once leave a CPU's caches, and cost up to half as much again.
CPU_MICROBATCH_TOKENS = 2048
# Of log-probabilities [rows, vocabulary] that a forward pass keeps for its backward pass; those of more
# rows are computed twice.
KEPT_LOGITS_BYTES = 64 << 20


class LearnerConfig(StrictModel):
    """The FSDP group: `ranks` processes, each with one GPU or one CPU core."""

    ranks: PositiveInt = 1
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; weights stay float32
    max_tokens_per_microbatch: PositiveInt = 8192
    logprob_chunk_rows: PositiveInt = 256  # rows of [rows, vocabulary] that exist at once
    activation_checkpointing: bool = False
    cpu_offload: bool = False  # weights and optimizer wait in the host's memory; needs a GPU
    max_restarts: int = Field(
        default=3, ge=0
    )  # of the group; each goes back to the newest checkpoint
    timeout_s: PositiveFloat = 600.0  # of one update, and of one collective

    def microbatch_tokens(self, device: str) -> int:
        """The most in one microbatch on "cpu" or "cuda"."""
        most = self.max_tokens_per_microbatch
        return min(most, CPU_MICROBATCH_TOKENS) if device == "cpu" else most


class KLConfig(StrictModel):
    """KL to the reference policy: k1 inside the reward, or k3 inside the loss."""

    coef: float = Field(default=0.05, ge=0)
    # Default: loss for grpo, whose standardisation would blow up a penalty in the reward; else reward.
    where: Literal["reward", "loss"] | None = None
    target: PositiveFloat | None = None  # nats a completion; given: the coefficient adapts to it
    # Trajectories over which it adapts (Ziegler et al. 2019, section 2.2).
    horizon: PositiveInt = 10000

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.target is not None and self.coef == 0:
            raise ValueError(
                "coef: 0 stays 0 with a target, which multiplies it; set coef above 0, or leave out target"
            )
        return self


class PtxConfig(StrictModel):
    """PPO-ptx: + coef * E[log pi(x)] over a Parquet or JSONL of prompt, completion rows."""

    path: str
    coef: PositiveFloat
    batch_size: PositiveInt


class RefuseConfig(StrictModel):
    """Bounds beyond which a PPO step is refused as a whole: nothing has changed then, and another
    batch is taken. What is not finite is refused always."""

    approx_kl: PositiveFloat | None = None  # of a minibatch, before its optimizer step
    grad_norm: PositiveFloat | None = None  # of policy or critic, before clipping
    behavior_difference: PositiveFloat | None = None  # mean distance to the generators' logprobs
    max_in_a_row: PositiveInt = 3  # then the run saves a checkpoint and fails


class PPOConfig(StrictModel):
    """One PPO step: how advantages are made, how the loss is clipped, how often it is applied."""

    advantage: Literal["gae", "sequence", "grpo", "rloo", "reinforce++"] = "gae"
    gamma: float = Field(default=1.0, gt=0, le=1)
    lam: float = Field(default=0.95, ge=0, le=1)
    whiten_advantages: bool = True  # gae and sequence only
    ratio: Literal["token", "sequence", "sequence_mean"] = "token"
    clip_range: PositiveFloat = 0.2
    clip_range_high: PositiveFloat | None = None  # clip-higher (DAPO)
    dual_clip: float | None = Field(default=None, gt=1)
    value_clip_range: PositiveFloat | None = None
    value_coef: PositiveFloat = 1.0
    entropy_coef: float = Field(default=0.0, ge=0)
    epochs: PositiveInt = 2
    minibatches: PositiveInt = 2
    # Beyond it the rest of a step's minibatches is skipped.
    max_approx_kl: PositiveFloat | None = None
    anchor: Literal["learner", "behavior"] = "learner"
    behavior_ratio_cap: float | None = Field(default=None, ge=1)  # truncated importance correction
    refuse: RefuseConfig = RefuseConfig()
    kl: KLConfig = KLConfig()
    ptx: PtxConfig | None = None
    policy: OptimizerConfig = OptimizerConfig(lr=1e-6)
    value: OptimizerConfig = OptimizerConfig(lr=5e-6, decay="constant")
    # Own backbone, or a head on the policy's trunk.
    value_model: Literal["separate", "shared"] = "separate"
    value_init: str | None = None  # folder of the backbone; default: the policy's

    @property
    def uses_critic(self) -> bool:
        return self.advantage not in CRITIC_FREE

    @property
    def separate_critic(self) -> bool:
        """Whether the critic has a backbone of its own."""
        return self.uses_critic and self.value_model == "separate"

    @model_validator(mode="after")
    def _place_kl(self) -> Self:
        kl, grpo = self.kl, self.advantage == "grpo"
        if grpo and kl.where == "reward" and kl.coef > 0:
            raise ValueError(
                "kl.where: reward with advantage: grpo would scale the KL of a group with equal scores "
                "to a full advantage; set it to loss"
            )
        if kl.where is None:
            where = "loss" if grpo else "reward"
            # The model is frozen; what stands in config.yaml is what is done.
            object.__setattr__(self, "kl", kl.model_copy(update={"where": where}))
        return self

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.behavior_ratio_cap is not None and self.anchor == "behavior":
            raise ValueError(
                "behavior_ratio_cap: only with anchor: learner (with anchor: behavior the ratio "
                "itself corrects); remove one of the two"
            )
        if self.refuse.behavior_difference is not None and self.anchor == "behavior":
            raise ValueError(
                "refuse.behavior_difference: only with anchor: learner (with anchor: behavior the "
                "learner computes no logprobs to compare); remove one of the two"
            )
        if self.value_init is not None and self.value_model == "shared":
            raise ValueError("value_init: only with value_model: separate; remove one of the two")
        return self


class SFTConfig(StrictModel):
    """Supervised fine-tuning on prompt, completion rows; the loss is on completion tokens only."""

    data: str  # Parquet or JSONL: prompt, completion (or messages)
    # The same, of which the loss is told about ten times; never trained on.
    held_out_data: str | None = None
    batch_size: PositiveInt
    max_tokens: PositiveInt = 512  # prompt and completion; longer rows are refused
    optimizer: OptimizerConfig
