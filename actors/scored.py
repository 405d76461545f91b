"""A completion and its score become a trajectory; a prompt whose score cannot be had is dropped whole."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

from actors.trajectory import Completion, Prompt, Trajectory, trajectory_id
from reward_service.api import ScoreFailure, ScoreRequest, ScoreResponse

Sample = tuple[Prompt, int, Completion]  # the number among the prompt's samples


class Rewards(Protocol):
    async def score(self, requests: list[ScoreRequest]) -> list[ScoreResponse | ScoreFailure]: ...


@dataclass(frozen=True)
class Dropped:
    """A prompt that will not be trained, and why."""

    prompt_id: str
    epoch: int
    reason: str


@dataclass(frozen=True)
class Scored:
    """What became of a call's samples."""

    trajectories: list[Trajectory]
    dropped: list[Dropped]


async def score(
    rewards: Rewards, samples: list[Sample], *, temperature: float, generator_id: str
) -> Scored:
    """All samples in one call, in their order. Raises what the reward client raises."""
    started = time.time()
    scored = await rewards.score(
        [score_request(trajectory_id(p.prompt_id, p.epoch, n), p, c) for p, n, c in samples]
    )
    seconds = time.time() - started
    failed = {
        prompt.key: outcome.reason
        for (prompt, _, _), outcome in zip(samples, scored, strict=True)
        if isinstance(outcome, ScoreFailure)
    }
    trajectories = [
        _trajectory(sample, outcome, seconds, temperature, generator_id)
        for sample, outcome in zip(samples, scored, strict=True)
        if isinstance(outcome, ScoreResponse) and sample[0].key not in failed
    ]
    return Scored(trajectories, [Dropped(*key, reason) for key, reason in failed.items()])


def _trajectory(
    sample: Sample,
    response: ScoreResponse,
    score_s: float,
    temperature: float,
    generator_id: str,
) -> Trajectory:
    prompt, number, completion = sample
    return Trajectory(
        trajectory_id=response.trajectory_id,
        prompt_id=prompt.prompt_id,
        sample_index=number,
        epoch=prompt.epoch,
        prompt_ids=prompt.ids,
        completion_ids=completion.ids,
        behavior_logprobs=completion.logprobs,
        policy_version=completion.spans[0][0],
        policy_version_max=completion.spans[-1][0],
        version_spans=completion.spans,
        prompt=prompt.text,
        completion=completion.text,
        finish_reason=completion.finish_reason,
        score=response.score,
        score_parts=response.parts,
        temperature=temperature,
        generator_id=generator_id,
        generated_at=time.time(),
        generate_s=completion.generate_s,
        score_s=score_s,
    )


def score_request(name: str, prompt: Prompt, completion: Completion) -> ScoreRequest:
    return ScoreRequest(
        trajectory_id=name,
        prompt=prompt.text,
        completion=completion.text,
        prompt_ids=prompt.ids,
        completion_ids=completion.ids,
        finish_reason=completion.finish_reason,
        answer=prompt.answer,
        metadata=prompt.metadata,
        messages=prompt.messages,
    )
