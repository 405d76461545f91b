"""Configuration of scoring and of reward-model training. Imports nothing heavy."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, field_validator

# How an environment variable, or a parameter in a URL, is named that holds one.
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|CREDENTIAL", re.I)


class StrictModel(BaseModel):
    """Base of every config: frozen, unknown keys are errors, no NaN or inf."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FunctionScorerConfig(StrictModel):
    """A Python function of the user's: `module:function`, requests in, scores out."""

    kind: Literal["function"]
    function: str

    @field_validator("function")
    @classmethod
    def _names_a_function(cls, given: str) -> str:
        if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", given):
            raise ValueError(f"{given!r:.60} names no function; write module:function")
        return given


class RewardModelScorerConfig(StrictModel):
    """A Hugging Face sequence-classification folder with one label."""

    kind: Literal["reward_model"]
    path: str
    # text: tokenised anew, for another vocabulary; messages: by its own chat template, too
    input: Literal["tokens", "text", "messages"] = "tokens"
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_batch_tokens: PositiveInt = 16384  # padded tokens of one forward pass


class HttpScorerConfig(StrictModel):
    """A remote endpoint; plain http is accepted for loopback only."""

    kind: Literal["http"]
    url: str
    token_env: str | None = None  # name of the environment variable that holds the bearer token
    allow_hosts: tuple[str, ...] = ()  # where given, the URL's host must be one of them
    timeout_s: PositiveFloat = 30.0  # of one request, from connecting to the last byte
    max_response_bytes: PositiveInt = 4 << 20


PartName = Annotated[str, Field(pattern=r"^[^/]+$")]  # "/" joins the names of nested parts


class SumPartConfig(StrictModel):
    weight: float
    scorer: ScorerConfig


class SumScorerConfig(StrictModel):
    """Weighted sum; the unweighted parts are kept in `score_parts`."""

    kind: Literal["sum"]
    parts: dict[PartName, SumPartConfig] = Field(min_length=1)


ScorerConfig = Annotated[
    FunctionScorerConfig | RewardModelScorerConfig | HttpScorerConfig | SumScorerConfig,
    Field(discriminator="kind"),
]


class RewardServiceConfig(StrictModel):
    """How completions are scored, and what happens when that fails."""

    scorer: ScorerConfig
    batch_size: PositiveInt = 64  # requests of one call to the scorer
    max_wait_s: float = Field(default=0.01, ge=0)  # how long a batch waits to fill
    deadline_s: PositiveFloat = 60.0  # of one call to the scorer; time in the queue is not counted
    max_retries: int = Field(default=2, ge=0)
    max_restarts: int = Field(default=3, ge=0)  # of the service's process
    start_timeout_s: PositiveFloat = 300.0  # to load, the first time and after a restart
    max_concurrency: PositiveInt = 4  # scorer calls at once
    on_failure: Literal["fail", "drop"] = "fail"
    num_gpus: float = Field(default=0.0, ge=0)  # of the service's actor; a fraction shares one


class RewardTrainingConfig(StrictModel):
    """Pairwise training of r_theta(x, y)."""

    pairs: str  # Parquet or JSONL: prompt, chosen, rejected
    held_out_pairs: str | None = None
    # Parquet or JSONL: prompt, completion; scores get mean 0, sd 1 on it
    normalise_on: str | None = None
    epochs: PositiveInt = 1
    batch_size: PositiveInt = 32  # pairs an optimizer step
    max_tokens: PositiveInt = 512  # prompt and completion; longer pairs are refused
    max_batch_tokens: PositiveInt = 16384  # padded tokens of one forward pass; changes no result
    lr: PositiveFloat = 1e-5
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=10, ge=0)
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    max_grad_norm: PositiveFloat = 1.0
