"""Configuration of prompts, sampling and generators. Imports nothing heavy."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from reward_service.config import StrictModel


class PromptsConfig(StrictModel):
    """Where prompts come from. Columns: `prompt` (text) or `messages` (chat template), and
    optionally `prompt_id`, `answer` and `metadata` (handed to the scorer)."""

    path: str  # Parquet or JSONL
    max_prompt_tokens: PositiveInt | None = None  # default: the context less sampling.max_tokens
    on_too_long: Literal["refuse", "drop"] = "refuse"
    shuffle: bool = True
    limit: PositiveInt | None = None  # first N rows only


class SamplingConfig(StrictModel):
    """How completions are sampled. There is no top_p or top_k: they would train on other
    probabilities than they sample from."""

    max_tokens: PositiveInt
    temperature: PositiveFloat = 1.0
    samples_per_prompt: PositiveInt = 1
    stop: tuple[str, ...] = ()


class GeneratorsConfig(StrictModel):
    """The vLLM engines. `count` engines of `tensor_parallel_size` GPUs each (or one CPU core each)."""

    count: PositiveInt = 1
    tensor_parallel_size: PositiveInt = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_model_len: PositiveInt = 512
    max_num_seqs: PositiveInt = 64  # completions that decode together in one engine
    # None: vLLM's share of a GPU's memory; required on CPU.
    kv_cache_bytes: PositiveInt | None = None
    gpu_memory_utilization: float = Field(default=0.85, gt=0, le=1)  # GPU only
    weight_update: Literal["in_flight", "drained"] = "in_flight"
    # CPU only. packed: each engine keeps a copy of its own, in the format it samples fastest from.
    # shared: engines compute on the segment that the learner wrote: a push copies nothing, and any
    # number of engines hold the weights once, but each computes on them more slowly. It pays where pushes
    # are frequent next to the tokens sampled in between, or where memory is short.
    weight_memory: Literal["packed", "shared"] = "packed"
    # delta: in the message, only what changed since the version before, exactly (compressed; learner
    # and generators keep one image of the weights more). For slow links between machines, with
    # bfloat16 above all; learner and generators on one machine then use no shared memory either.
    weight_push: Literal["full", "delta"] = "full"
    max_restarts: int = Field(
        default=10, ge=0
    )  # of all generators together; one that fails is replaced
    rollout_timeout_s: PositiveFloat = 300.0  # no completion for so long: the generator has failed
