"""Held-out evaluation: sample, let the judge score, compare with the policy at the start.

win_rate: share of samples that the judge scores above an independent sample of the starting policy
for the same prompt, a tie counts half. So at the start it is 0.5 but for noise.
"""

from __future__ import annotations

import asyncio
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from actors.trajectory import Completion, Prompt
from cluster.checkpoints import step_name
from cluster.config import EvaluationConfig
from cluster.learner_group import LearnerGroup
from cluster.placement import FOREVER_S, Member, RoleFailed, ask
from cluster.replace_file import replacing
from cluster.supervisor import Supervisor
from learner.learner_spec import Samples
from reward_service.api import RewardFailure, ScoreRequest, ScoreResponse, ScoreResult
from reward_service.client import RewardClient
from reward_service.config import RewardServiceConfig

AGAIN_S = 0.5
BASELINE = "baseline"


@dataclass(frozen=True)
class Evaluated:
    """The samples of one evaluation, and its figures."""

    step: int
    table: pa.Table
    metrics: dict[str, float]


class Evaluation:
    def __init__(
        self,
        config: EvaluationConfig,
        prompts: list[Prompt],
        folder: Path,
        *,
        seed: int,
        supervisor: Supervisor,
        learner: LearnerGroup,
        judge: Member,
        rewards: Member,
        retries: RewardServiceConfig,
    ) -> None:
        """`rewards` may be the judge itself; then one score serves as both. `retries`: how often a failed
        request is sent again."""
        self._config = config
        repeats = -(-(config.num_samples or len(prompts)) // len(prompts))
        draws = [replace(prompt, epoch=i) for i in range(repeats) for prompt in prompts]
        self._prompts = draws[: config.num_samples or len(prompts)]
        self._folder = folder
        self._seed = seed
        self._supervisor = supervisor
        self._learner = learner
        self._judge = judge
        self._rewards = rewards
        self._retries = retries.model_copy(update={"on_failure": "fail"})

    async def start(self) -> None:
        """Sample the baseline: what every later evaluation is compared with."""
        if not self._path(BASELINE).is_file():
            self._write(BASELINE, await self._sampled(BASELINE))

    async def run(self, step: int) -> Evaluated:
        """Evaluate the policy the generators have now."""
        name = step_name(step)
        table = await self._sampled(name)
        self._write(name, table)
        baseline = pq.read_table(self._path(BASELINE))["judge_score"].to_numpy()
        judged = table["judge_score"].to_numpy()
        metrics = {
            "evaluation/win_rate": float(np.mean((judged > baseline) + 0.5 * (judged == baseline))),
            "evaluation/judge_mean": float(judged.mean()),
            "evaluation/reward_mean": float(table["reward_score"].to_numpy().mean()),
        }
        if self._config.temperature > 0:  # of greedy completions it would be no estimate of the KL
            metrics["evaluation/kl_to_ref"] = float(table["kl_to_ref"].to_numpy().mean())
        return Evaluated(step, table, metrics)

    def read(self, step: int) -> pa.Table:
        return pq.read_table(self._path(step_name(step)))

    async def _sampled(self, name: str) -> pa.Table:
        seed = zlib.crc32(f"{self._seed}/{name}".encode())
        samples: list[tuple[ScoreRequest, Completion]] = await self._supervisor.sample(
            self._prompts, self._config.temperature, seed
        )
        requests = [request for request, _ in samples]
        completions = [completion for _, completion in samples]
        judged = await self._scores(self._judge, requests)
        same = self._rewards is self._judge
        rewards = judged if same else await self._scores(self._rewards, requests)
        reference = await self._learner.reference_logprobs(
            Samples(
                tuple(np.array(r.prompt_ids) for r in requests),
                tuple(np.array(c.ids) for c in completions),
                self._config.temperature or 1.0,
            )
        )
        kl = [
            sum(c.logprobs) - float(ref.sum())
            for c, ref in zip(completions, reference, strict=True)
        ]
        return pa.table(
            {
                "prompt_id": [prompt.prompt_id for prompt in self._prompts],
                "prompt": [request.prompt for request in requests],
                "completion": [request.completion for request in requests],
                "judge_score": pa.array(judged, pa.float64()),
                "reward_score": pa.array(rewards, pa.float64()),
                "kl_to_ref": pa.array(kl, pa.float64()),
                "finish_reason": [request.finish_reason for request in requests],
            }
        )

    async def _scores(self, service: Member, requests: list[ScoreRequest]) -> list[float]:
        """Scores, with training's retries. RoleFailed if one is missing."""
        client = RewardClient(
            lambda asked: _answer(service, asked), self._retries, max_batches=len(requests)
        )
        try:
            results = await client.score(requests)
        except RewardFailure as failure:
            raise RoleFailed(f"{service.name}: {failure}", cause=failure) from None
        return [result.score for result in results if isinstance(result, ScoreResponse)]

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.parquet"

    def _write(self, name: str, table: pa.Table) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with replacing(self._path(name)) as aside:
            pq.write_table(table, aside)


async def _answer(service: Member, requests: list[ScoreRequest]) -> list[ScoreResult]:
    """Asked again if its process is being restarted; RewardClient has the deadline."""
    while True:
        try:
            results: list[ScoreResult] = await ask(
                service, service.handle.score, requests, within=FOREVER_S
            )
            return results
        except RoleFailed as failed:
            if not failed.comes_back:
                raise
        await asyncio.sleep(AGAIN_S)
