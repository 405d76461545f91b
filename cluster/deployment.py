"""Starts a run's components, the first time and again: each with its own part of the config.

Nothing here waits: components load side by side, and whoever needs one asks it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.vllm_engine import CPU_ENGINE_ENV, ENGINE_ENV
from cluster.config import RunConfig
from cluster.doctor import Inputs
from cluster.placement import Host, Member
from cluster.roles import LearnerRole, RewardRole, RolloutRole
from cluster.specs import learner_spec, rollout_spec
from learner.learner_spec import LEARNER_ENV
from reward_service.config import RewardServiceConfig


@dataclass
class Deployment:
    """`members`: everything that was started, for the end of the run."""

    config: RunConfig
    inputs: Inputs
    host: Host
    logs: Path
    members: list[Member] = field(default_factory=list)

    def reward_service(self, name: str, reward: RewardServiceConfig) -> Member:
        # Which calls come together is a matter of timing.
        merge = self.config.max_staleness > 0 and not self.config.deterministic
        return self._start(
            name,
            RewardRole,
            *(name, reward, merge, self.logs / f"{name}.log"),
            env=LEARNER_ENV,
            gpus=reward.num_gpus,
            max_restarts=reward.max_restarts,
        )

    def generators(self, rewards: Member) -> list[Member]:
        return [self.generator(rewards, slot) for slot in range(self.config.generators.count)]

    def generator(self, rewards: Member, slot: int, attempt: int = 0) -> Member:
        name = _name("generator", slot, attempt)
        return self._start(
            name,
            RolloutRole,
            *(rollout_spec(self.config, name, self.logs), rewards.handle),
            env=ENGINE_ENV if self.config.device == "cuda" else CPU_ENGINE_ENV,
            gpus=self.config.generators.tensor_parallel_size,
        )

    def learner_ranks(self, attempt: int = 0) -> list[Member]:
        spec = learner_spec(self.config, self.inputs)
        names = [_name("learner", rank, attempt) for rank in range(self.config.learner.ranks)]
        return [
            self._start(
                name,
                LearnerRole,
                *(spec, rank, self.logs / f"{name}.log"),
                env=LEARNER_ENV,
                gpus=1,
            )
            for rank, name in enumerate(names)
        ]

    def _start(
        self,
        name: str,
        kind: type,
        *args: Any,
        env: dict[str, str],
        gpus: float,
        max_restarts: int = 0,
    ) -> Member:
        if self.config.device != "cuda":
            gpus = 0
        member = self.host.start(name, kind, *args, env=env, gpus=gpus, max_restarts=max_restarts)
        self.members.append(member)
        return member


def _name(role: str, number: int, attempt: int) -> str:
    """generator-0, and generator-0.3 if it is the third that had to be started anew."""
    return f"{role}-{number}.{attempt}" if attempt else f"{role}-{number}"
