"""The rollout: prompt -> completion -> score -> trajectory. Runs beside its generator.

    submit(prompts) --> generator --> completion --> reward client --> trajectory --> take()

`take` is a long poll: it answers with all prompts that have become complete since the last one, by
name, and beside the answer with their trajectories as one packed Table, which the driver passes on
without looking into it. A prompt is complete when all its samples are scored; if one sample's score cannot
be had and the reward policy is to drop, the whole prompt is dropped, as its group would be.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa

from actors.config import SamplingConfig
from actors.generate_request import GenerateRequest
from actors.scored import Dropped, Rewards, Sample, Scored, score, score_request
from actors.trajectory import Completion, Key, Prompt, Trajectory, packed, to_table, trajectory_id
from actors.weight_update import ProbeAnswer, WeightLayout, WeightUpdate
from reward_service.api import ScoreRequest

# Seconds. A call to the reward service costs this process milliseconds that its engine needs.
GATHER_S = 0.1

Scoring = Literal["together", "each", "gathered"]


class Engine(Protocol):
    """What a rollout needs of a generator."""

    name: str

    async def generate(
        self, requests: Sequence[GenerateRequest]
    ) -> list[asyncio.Future[Completion]]: ...
    async def agree_layout(self, layout: WeightLayout) -> str: ...
    async def receive_weights(self, update: WeightUpdate) -> dict[str, float]: ...
    async def receive_answer(self, answer: ProbeAnswer) -> None: ...
    async def status(self) -> dict[str, Any]: ...
    async def forget(self) -> None: ...
    async def close(self) -> None: ...


@dataclass(frozen=True)
class Rollouts:
    """What has become complete: whole prompts, and prompts given up."""

    finished: list[Key] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.finished or self.dropped)


class RolloutWorker:
    """Turns prompts into trajectories on one generator."""

    def __init__(
        self,
        engine: Engine,
        rewards: Rewards,
        sampling: SamplingConfig,
        *,
        seed: int,
        scoring: Scoring,
    ) -> None:
        """What one call to the reward service holds. together: all prompts of a submit, in order, once
        the last is sampled. each: one prompt's samples. gathered: a prompt's samples with all others
        that are there within GATHER_S. With the first two no score can depend on timing (of a model
        the last bits do, if a batch is another one)."""
        self._engine = engine
        self._rewards = rewards
        self._sampling = sampling
        self._seed = seed
        self._scoring = scoring
        self._finished: asyncio.Queue[Scored | BaseException] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._sampled: list[Sample] = []  # to be scored with the next call
        self._num_scoring = 0  # samples that the reward service has

    def __repr__(self) -> str:
        return f"RolloutWorker({self._engine.name})"

    async def submit(self, prompts: list[Prompt]) -> None:
        """Start rolling out; the results come by `take`."""
        requests = [
            GenerateRequest(
                trajectory_id(prompt.prompt_id, prompt.epoch, sample),
                prompt.ids,
                self._sampling.max_tokens,
                self._sampling.temperature,
                sample_seed(self._seed, prompt, sample),
                self._sampling.stop,
            )
            for prompt in prompts
            for sample in range(self._sampling.samples_per_prompt)
        ]
        futures = await self._engine.generate(requests)
        n = self._sampling.samples_per_prompt
        groups = [(p, futures[i * n : (i + 1) * n]) for i, p in enumerate(prompts)]
        if self._scoring == "together":
            self._spawn(self._roll_out(groups))
        else:
            rolled_out = self._gather if self._scoring == "gathered" else self._alone
            for prompt, samples in groups:
                self._spawn(rolled_out(prompt, samples))

    async def take(
        self, timeout_s: float, linger_s: float = 0.0
    ) -> tuple[Rollouts, pa.Buffer | None]:
        """What is complete, and its trajectories (samples of one prompt together, in order), waiting
        at most `timeout_s` for the first and then `linger_s` for more, so that a driver with many
        workers is called less often. Raises what a rollout raised (GeneratorFailed,
        WeightsRejected, RewardFailure)."""
        try:
            items = [await asyncio.wait_for(self._finished.get(), timeout_s)]
        except TimeoutError:
            return Rollouts(), None
        if linger_s:
            await asyncio.sleep(linger_s)
        while not self._finished.empty():
            items.append(self._finished.get_nowait())
        trajectories: list[Trajectory] = []
        dropped: list[Dropped] = []
        for item in items:
            if isinstance(item, BaseException):
                raise item
            trajectories += item.trajectories
            dropped += item.dropped
        finished = list(dict.fromkeys((t.prompt_id, t.epoch) for t in trajectories))
        chunk = packed(to_table(trajectories)) if trajectories else None
        return Rollouts(finished, dropped), chunk

    async def sample(
        self, prompts: list[Prompt], temperature: float, seed: int
    ) -> list[tuple[ScoreRequest, Completion]]:
        """One completion a prompt, not scored and not trained on: for evaluation and self-check.
        A prompt may come several times, with an epoch of its own each time."""
        requests = [
            GenerateRequest(
                f"sample-{seed}-{trajectory_id(prompt.prompt_id, prompt.epoch, 0)}",
                prompt.ids,
                self._sampling.max_tokens,
                temperature,
                sample_seed(seed, prompt, 0),
                self._sampling.stop,
            )
            for prompt in prompts
        ]
        completions = await asyncio.gather(*await self._engine.generate(requests))
        return [
            (score_request(request.request_id, prompt, completion), completion)
            for request, prompt, completion in zip(requests, prompts, completions, strict=True)
        ]

    async def agree_layout(self, layout: WeightLayout) -> str:
        return await self._engine.agree_layout(layout)

    async def receive_weights(self, update: WeightUpdate) -> dict[str, float]:
        return await self._engine.receive_weights(update)

    async def receive_answer(self, answer: ProbeAnswer) -> None:
        await self._engine.receive_answer(answer)

    async def status(self) -> dict[str, Any]:
        return {**await self._engine.status(), "scoring": self._num_scoring}

    async def reset(self) -> None:
        """Forget every prompt, whatever state it is in; the engine and its weights stay."""
        await self._cancel()
        await self._engine.forget()
        self._sampled.clear()
        self._finished = asyncio.Queue()

    async def close(self) -> None:
        await self._cancel()
        await self._engine.close()

    async def _cancel(self) -> None:
        tasks = [*self._tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _spawn(self, rollout: Any) -> None:
        task = asyncio.create_task(rollout)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _alone(self, prompt: Prompt, samples: list[asyncio.Future[Completion]]) -> None:
        await self._roll_out([(prompt, samples)])

    async def _gather(self, prompt: Prompt, samples: list[asyncio.Future[Completion]]) -> None:
        """Wait for one prompt's samples; the first of a gathering scores it."""
        try:
            done = [(prompt, number, await future) for number, future in enumerate(samples)]
        except Exception as error:
            self._finished.put_nowait(error)
            return
        self._sampled += done
        if len(self._sampled) == len(done):
            await asyncio.sleep(GATHER_S)
            gathered, self._sampled = self._sampled, []
            await self._finish(gathered)

    async def _roll_out(
        self, groups: list[tuple[Prompt, list[asyncio.Future[Completion]]]]
    ) -> None:
        try:
            samples = [
                (prompt, number, await future)
                for prompt, futures in groups
                for number, future in enumerate(futures)
            ]
        except Exception as error:
            self._finished.put_nowait(error)
            return
        await self._finish(samples)

    async def _finish(self, samples: list[Sample]) -> None:
        self._num_scoring += len(samples)
        try:
            scored = await score(
                self._rewards,
                samples,
                temperature=self._sampling.temperature,
                generator_id=self._engine.name,
            )
            self._finished.put_nowait(scored)
        except Exception as error:  # handed to whoever takes, who decides; never lost in a task
            self._finished.put_nowait(error)
        finally:
            self._num_scoring -= len(samples)


def sample_seed(run_seed: int, prompt: Prompt, sample: int) -> int:
    """63 bits that only this sample has, whenever and wherever it is drawn."""
    name = f"{run_seed}/{prompt.prompt_id}/{prompt.epoch}/{sample}"
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int(np.frombuffer(digest, np.uint64)[0] >> np.uint64(1))
