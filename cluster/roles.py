"""The components as they are built where they run: what an actor's constructor does there.

No class here adds behaviour; it builds a component of its parts from a spec that pickles.
"""

from __future__ import annotations

import asyncio
import faulthandler
import io
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from actors.config import GeneratorsConfig, SamplingConfig
from actors.rollout_worker import RolloutWorker, Scoring
from actors.trajectory import Key, select, to_table
from actors.weight_update import ProbeAnswer, WeightLayout, WeightUpdate
from cluster.placement import DEATHS, LOST_ANSWERS, RoleFailed
from cluster.redaction import hide_tokens, printable
from learner.learner_spec import LearnerSpec, Rendezvous, Samples, StepRefused
from reward_service.api import ScoreRequest
from reward_service.client import RewardClient
from reward_service.config import RewardServiceConfig
from reward_service.fast_import import fast_import
from reward_service.service import RewardService

AGAIN_S = 0.2


@dataclass(frozen=True)
class RolloutSpec:
    """What one generator and its rollout worker are told."""

    name: str
    model: str
    generators: GeneratorsConfig
    sampling: SamplingConfig
    reward: RewardServiceConfig
    max_batches: int  # that the reward service may have at once
    probe_bound: float
    seed: int
    scoring: Scoring
    finish_all: bool
    log_file: Path


class RolloutRole(RolloutWorker):
    """A generator with its rollout worker, which reaches the reward service through `rewards`."""

    def __init__(self, spec: RolloutSpec, rewards: Any) -> None:
        settle_in(spec.log_file)
        hide_tokens(spec.reward.scorer)
        from actors.generator import Generator
        from reward_service.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(spec.model)
        generator = Generator(
            spec.generators,
            model=spec.model,
            name=spec.name,
            probe_bound=spec.probe_bound,
            finish_all=spec.finish_all,
            decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        )
        call = rewards.score.remote if hasattr(rewards.score, "remote") else rewards.score
        super().__init__(
            generator,
            RewardClient(_awaiting(call), spec.reward, max_batches=spec.max_batches),
            spec.sampling,
            seed=spec.seed,
            scoring=spec.scoring,
        )


class LearnerRole:
    """One rank of the learner. The driver sees this class only, so it needs no torch."""

    def __init__(self, spec: LearnerSpec, rank: int, log_file: Path) -> None:
        settle_in(log_file)
        with fast_import():
            from learner.learner_worker import LearnerWorker
        self._name = f"Learner(rank {rank} of {spec.learner.ranks})"
        self._worker = LearnerWorker(spec, rank)

    def __repr__(self) -> str:
        return self._name

    def port(self) -> int:
        return self._worker.port()

    def start(self, rendezvous: Rendezvous) -> dict[str, Any]:
        return self._worker.start(rendezvous)

    def prepare_publish(self, segment: str | None) -> WeightLayout:
        return self._worker.prepare_publish(segment)

    def publish(self, version: int) -> WeightUpdate | None:
        return self._worker.publish(version)

    def answer_probe(self, version: int) -> ProbeAnswer | None:
        return self._worker.answer_probe(version)

    def last_update(self, in_message: bool) -> tuple[WeightUpdate, ProbeAnswer]:
        return self._worker.last_update(in_message)

    def update(
        self, step: int, version: int, folder: str, keys: list[Key], *chunks: pa.Buffer
    ) -> dict[str, float] | StepRefused:
        """`chunks` as arguments of their own: so Ray brings them here before the call is made."""
        return self._worker.update(select(chunks, keys), step, version, folder)

    def save_trajectories(self, path: str, keys: list[Key], *chunks: pa.Buffer) -> None:
        pq.write_table(select(chunks, keys) if keys else to_table([]), path)

    def policy_logprobs(self, samples: Samples) -> list[np.ndarray]:
        return self._worker.policy_logprobs(samples)

    def reference_logprobs(self, samples: Samples) -> list[np.ndarray]:
        return self._worker.reference_logprobs(samples)

    def save(self, folder: str) -> None:
        self._worker.save(folder)

    def saved(self) -> bool:
        return self._worker.saved()

    def load(self, folder: str) -> None:
        self._worker.load(folder)

    def close(self) -> None:
        self._worker.close()


class RewardRole(RewardService):
    """The reward service, or the judge of the evaluation."""

    def __init__(
        self, name: str, config: RewardServiceConfig, merge_calls: bool, log_file: Path
    ) -> None:
        settle_in(log_file)
        hide_tokens(config.scorer)
        if _is_actor():  # nobody would see what a reward function prints
            sys.stdout = sys.stderr = _Printed(log_file)
        self._name = name
        with fast_import():
            super().__init__(config, merge_calls=merge_calls)

    def __repr__(self) -> str:
        return f"RewardService({self._name})"

    def pid(self) -> int:
        """Another one means that Ray has restarted the process."""
        return os.getpid()


def _awaiting(call: Any) -> Any:
    """While the service's process is being restarted a call is made again; the caller has a deadline."""

    async def score(requests: Sequence[ScoreRequest]) -> Any:
        while True:
            try:
                return await call(requests)
            except Exception as error:
                name = type(error).__name__
                if name not in ("ActorUnavailableError", *LOST_ANSWERS):
                    if name in DEATHS:
                        raise RoleFailed("the reward service's process died") from None
                    raise
            await asyncio.sleep(AGAIN_S)

    return score


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _Printed(io.TextIOBase):
    """Where `print` goes; each line at once, without secrets."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1)

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if not text.startswith(":actor_name:"):  # of Ray's, for its own log
            self._file.write(printable(text))
        return len(text)

    def flush(self) -> None:
        self._file.flush()


def _is_actor() -> bool:
    if "ray" not in sys.modules:
        return False
    import ray

    return ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None


def settle_in(path: Path) -> None:
    """Work where the driver works, so that relative paths mean the same; and send this process's
    warnings, and the stacks of a crash, into the run's own log of this actor."""
    if os.path.isdir(home := os.environ.get("RAYLIGN_HOME", "")):
        os.chdir(home)
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, delay=True)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.setLevel(logging.WARNING)
    logging.getLogger().addHandler(handler)
    if _is_actor():  # in one process the terminal is the better place
        faulthandler.enable(path.open("a"))
