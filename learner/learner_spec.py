"""What the driver and the ranks of a learner tell each other. Imports no torch: the driver needs none."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from actors.vllm_engine import TUNABLES
from actors.weight_update import Probe
from learner.config import LearnerConfig, PPOConfig

# The environment of a learner process. Must be set before torch is imported.
LEARNER_ENV = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    # A forward pass gathers its weights into new memory, and on CPU the page faults of that take
    # longer than the copying.
    "GLIBC_TUNABLES": TUNABLES,
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}


@dataclass(frozen=True)
class Rendezvous:
    """Where ranks meet. On one machine that is a file, so that nothing listens; otherwise TCP."""

    world_size: int
    file: str = ""
    host: str = ""
    port: int = 0


@dataclass(frozen=True)
class LearnerSpec:
    """What one rank is told; nothing of the config that is not its own."""

    policy: str
    reference: str
    ppo: PPOConfig
    learner: LearnerConfig
    seed: int
    num_steps: int
    push_dtype: str
    probe: Probe
    push_delta: bool = False


@dataclass(frozen=True)
class Samples:
    """Completions whose logprobs are asked for; nothing is trained on them."""

    prompt_ids: tuple[np.ndarray, ...]
    completion_ids: tuple[np.ndarray, ...]
    temperature: float

    @property
    def lengths(self) -> list[int]:
        return [len(p) + len(c) for p, c in zip(self.prompt_ids, self.completion_ids, strict=True)]


@dataclass(frozen=True)
class StepRefused:
    """A PPO step that was not taken: the learner is, to the bit, as it was before."""

    step: int
    reason: str
    metrics: dict[str, float]  # that it was judged by; some may be NaN or infinite

    @property
    def kind(self) -> str:
        """The reason without its numbers, which another number of ranks may round differently."""
        return re.sub(r"\S*\d\S*", "#", self.reason)
