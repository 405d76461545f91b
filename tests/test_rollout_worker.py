"""Prompts become whole, scored groups; whatever goes wrong reaches the one who takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.config import SamplingConfig
from actors.generate_request import GenerateRequest, GeneratorFailed
from actors.rollout_worker import RolloutWorker, Scoring, sample_seed
from actors.scored import Dropped
from actors.trajectory import Completion, Trajectory, from_table, unpacked
from reward_service.api import ScoreFailure, ScoreRequest, ScoreResponse, ScorerRaised
from tests import tiny

SOON_S, NEVER_S = 0.05, 5.0


class FakeEngine:
    """Completes requests when told to: at once, or by `finish`, in any order."""

    name = "generator-0"

    def __init__(self, *, at_once: bool = True) -> None:
        self.requests: list[GenerateRequest] = []
        self.futures: dict[str, asyncio.Future[Completion]] = {}
        self.calls = 0
        self.closed = False
        self._at_once = at_once

    async def generate(
        self, requests: Sequence[GenerateRequest]
    ) -> list[asyncio.Future[Completion]]:
        self.calls += 1
        loop = asyncio.get_running_loop()
        for request in requests:
            self.requests.append(request)
            self.futures[request.request_id] = loop.create_future()
            if self._at_once:
                self.finish(request.request_id)
        return [self.futures[request.request_id] for request in requests]

    def finish(self, name: str, error: Exception | None = None) -> None:
        if error is not None:
            self.futures[name].set_exception(error)
            return
        number = len(name)
        self.futures[name].set_result(
            Completion(
                (5, 6 + number, 1), (-1.0, -2.0, -0.5), f"of {name}", "stop", ((3, 0), (4, 2)), 0.1
            )
        )

    async def forget(self) -> None:
        self.futures.clear()

    async def close(self) -> None:
        self.closed = True


class FakeRewards:
    """Scores by a rule of the test's; remembers the calls."""

    def __init__(self, rule: Callable[[ScoreRequest], Any] = lambda request: 1.0) -> None:
        self.calls: list[list[str]] = []
        self.requests: list[ScoreRequest] = []
        self._rule = rule

    async def score(self, requests: list[ScoreRequest]) -> list[Any]:
        self.calls.append([request.trajectory_id for request in requests])
        self.requests += requests
        await asyncio.sleep(0)
        return [self._result(request) for request in requests]

    def _result(self, request: ScoreRequest) -> ScoreResponse | ScoreFailure:
        value = self._rule(request)
        if isinstance(value, str):
            return ScoreFailure(request.trajectory_id, "raised", value)
        return ScoreResponse(request.trajectory_id, value, {"length": 3.0})


def worker(
    engine: FakeEngine,
    rewards: Any = None,
    *,
    samples: int = 2,
    together: bool = True,
    scoring: Scoring | None = None,
    seed: int = 0,
) -> RolloutWorker:
    sampling = SamplingConfig(
        max_tokens=8, temperature=0.7, samples_per_prompt=samples, stop=("x",)
    )
    return RolloutWorker(
        engine,
        rewards or FakeRewards(),
        sampling,
        seed=seed,
        scoring=scoring or ("together" if together else "gathered"),
    )


@dataclass(frozen=True)
class Taken:
    trajectories: list[Trajectory]
    dropped: list[Dropped]


NOTHING = Taken([], [])


async def taken_from(rollouts: RolloutWorker, timeout_s: float, linger_s: float = 0.0) -> Taken:
    """One take, its Table read; what it says is finished is what the Table holds."""
    said, chunk = await rollouts.take(timeout_s, linger_s)
    trajectories = from_table(unpacked(chunk)) if chunk is not None else []
    assert said.finished == list(dict.fromkeys((t.prompt_id, t.epoch) for t in trajectories))
    return Taken(trajectories, said.dropped)


async def take_all(rollouts: RolloutWorker, prompts: int) -> Taken:
    """Takes until that many prompts are finished or dropped."""
    taken = NOTHING
    while len({t.prompt_id for t in taken.trajectories}) + len(taken.dropped) < prompts:
        more = await taken_from(rollouts, NEVER_S)
        taken = Taken(taken.trajectories + more.trajectories, taken.dropped + more.dropped)
    return taken


async def test_trajectories_come_in_the_order_of_prompts_and_samples() -> None:
    engine = FakeEngine()
    rollouts = worker(engine)
    await rollouts.submit([tiny.prompt(i) for i in (3, 1, 2)])
    taken = await taken_from(rollouts, NEVER_S)
    assert [t.trajectory_id for t in taken.trajectories] == [
        f"p{i}-e0-{sample}" for i in (3, 1, 2) for sample in (0, 1)
    ]
    assert taken.dropped == []


async def test_a_trajectory_holds_what_prompt_engine_and_scorer_gave() -> None:
    rewards = FakeRewards(lambda request: 2.5)
    rollouts = worker(FakeEngine(), rewards, samples=1)
    said = [{"role": "user", "content": "4+1="}]
    await rollouts.submit([tiny.prompt(4, epoch=2, metadata={"k": 1}, messages=said)])
    (made,) = (await taken_from(rollouts, NEVER_S)).trajectories
    (asked,) = rewards.requests
    assert (
        tuple(made.completion_ids)
        == asked.completion_ids
        == (
            5,
            6 + len(asked.trajectory_id),
            1,
        )
    )
    assert made.behavior_logprobs == [-1.0, -2.0, -0.5]
    assert (made.prompt, made.prompt_ids, made.epoch) == ("4+1=", [2, 7], 2)
    assert (made.policy_version, made.policy_version_max) == (3, 4)
    assert made.version_spans == [(3, 0), (4, 2)]
    assert (made.score, made.score_parts, made.temperature) == (
        2.5,
        {"length": 3.0},
        pytest.approx(0.7),
    )
    assert (made.generator_id, made.finish_reason) == ("generator-0", "stop")
    assert (asked.answer, asked.metadata, asked.completion) == ("5", {"k": 1}, "of p4-e2-0")
    assert asked.messages == said


async def test_the_engine_is_asked_as_the_config_says() -> None:
    engine = FakeEngine()
    await worker(engine, samples=3).submit([tiny.prompt(1)])
    assert [r.request_id for r in engine.requests] == ["p1-e0-0", "p1-e0-1", "p1-e0-2"]
    assert {(r.prompt_ids, r.max_tokens, r.temperature, r.stop) for r in engine.requests} == {
        ((2, 4), 8, 0.7, ("x",))
    }


async def test_every_sample_has_a_seed_of_its_own_and_the_same_in_every_run() -> None:
    engines = [FakeEngine() for _ in range(3)]
    prompts = [tiny.prompt(i, epoch) for epoch in range(4) for i in range(8)]
    for engine, seed in zip(engines, (0, 0, 1), strict=True):
        await worker(engine, samples=4, seed=seed).submit(prompts)
    one, again, other = ([r.seed for r in engine.requests] for engine in engines)
    assert one == again
    assert len(set(one)) == len(one)
    assert not set(one) & set(other)


@given(st.integers(0, 2**40), st.text(max_size=9), st.integers(0, 99), st.integers(0, 99))
def test_a_seed_is_what_an_engine_takes(run: int, name: str, epoch: int, sample: int) -> None:
    seed = sample_seed(run, tiny.prompt(0, epoch, prompt_id=name), sample)
    assert 0 <= seed < 2**63
    assert isinstance(seed, int)


async def test_the_seed_of_a_sample_does_not_depend_on_what_it_is_submitted_with() -> None:
    alone, among = FakeEngine(), FakeEngine()
    await worker(alone).submit([tiny.prompt(5)])
    await worker(among).submit([tiny.prompt(i) for i in range(9)])
    seeds = {r.request_id: r.seed for r in among.requests}
    assert all(seeds[r.request_id] == r.seed for r in alone.requests)


async def test_a_group_is_handed_out_only_when_it_is_complete() -> None:
    engine = FakeEngine(at_once=False)
    rollouts = worker(engine, samples=3, together=False)
    await rollouts.submit([tiny.prompt(0), tiny.prompt(1)])
    for name in ("p1-e0-2", "p0-e0-0", "p1-e0-0"):
        engine.finish(name)
    assert await taken_from(rollouts, SOON_S) == NOTHING
    engine.finish("p1-e0-1")
    taken = await taken_from(rollouts, NEVER_S)
    assert [t.trajectory_id for t in taken.trajectories] == ["p1-e0-0", "p1-e0-1", "p1-e0-2"]


async def test_scored_together_there_is_one_call_in_order_whatever_the_timing() -> None:
    engine, rewards = FakeEngine(at_once=False), FakeRewards()
    rollouts = worker(engine, rewards)
    await rollouts.submit([tiny.prompt(i) for i in range(3)])
    names = [request.request_id for request in engine.requests]
    for name in reversed(names[1:]):
        engine.finish(name)
        await asyncio.sleep(0)
    assert await taken_from(rollouts, SOON_S) == NOTHING
    assert rewards.calls == []
    engine.finish(names[0])
    await taken_from(rollouts, NEVER_S)
    assert rewards.calls == [names]


async def test_scored_apart_each_prompt_is_scored_as_soon_as_it_is_there() -> None:
    engine, rewards = FakeEngine(at_once=False), FakeRewards()
    rollouts = worker(engine, rewards, together=False)
    await rollouts.submit([tiny.prompt(0), tiny.prompt(1)])
    for name in ("p1-e0-0", "p1-e0-1"):
        engine.finish(name)
    await taken_from(rollouts, NEVER_S)
    assert rewards.calls == [["p1-e0-0", "p1-e0-1"]]


@pytest.mark.parametrize("together", [True, False])
async def test_a_sample_without_a_score_drops_its_whole_prompt_with_the_reason(
    together: bool,
) -> None:
    rewards = FakeRewards(lambda r: "no score: 503" if r.trajectory_id == "p1-e0-0" else 1.0)
    rollouts = worker(FakeEngine(), rewards, together=together)
    await rollouts.submit([tiny.prompt(i) for i in range(3)])
    taken = await take_all(rollouts, 3)
    assert taken.dropped == [Dropped("p1", 0, "no score: 503")]
    assert [t.prompt_id for t in taken.trajectories] == ["p0", "p0", "p2", "p2"]


@pytest.mark.parametrize("together", [True, False])
async def test_an_exception_in_scoring_reaches_take(together: bool) -> None:
    class Broken:
        async def score(self, requests: list[ScoreRequest]) -> list[Any]:
            raise ScorerRaised("the judge is away")

    rollouts = worker(FakeEngine(), Broken(), together=together)
    await rollouts.submit([tiny.prompt(0)])
    with pytest.raises(ScorerRaised, match="the judge is away"):
        await taken_from(rollouts, NEVER_S)


async def test_an_exception_in_generation_reaches_take_and_nothing_is_scored() -> None:
    engine, rewards = FakeEngine(at_once=False), FakeRewards()
    rollouts = worker(engine, rewards)
    await rollouts.submit([tiny.prompt(0)])
    engine.finish("p0-e0-1")
    engine.finish("p0-e0-0", GeneratorFailed("generator-0: out of memory"))
    with pytest.raises(GeneratorFailed, match="out of memory"):
        await taken_from(rollouts, NEVER_S)
    assert rewards.calls == []


async def test_a_completion_that_makes_no_trajectory_reaches_take_as_an_error() -> None:
    engine = FakeEngine(at_once=False)
    rollouts = worker(engine, samples=1)
    await rollouts.submit([tiny.prompt(0)])
    nan = Completion((5,), (float("nan"),), "", "stop", ((0, 0),), 0.1)
    engine.futures["p0-e0-0"].set_result(nan)
    with pytest.raises(ValueError, match="p0-e0-0: a behavior logprob is not finite"):
        await taken_from(rollouts, NEVER_S)


async def test_take_waits_for_the_first_and_returns_at_once_when_it_comes() -> None:
    engine = FakeEngine(at_once=False)
    rollouts = worker(engine, samples=1)
    await rollouts.submit([tiny.prompt(0)])
    asyncio.get_running_loop().call_later(SOON_S, engine.finish, "p0-e0-0")
    started = time.monotonic()
    taken = await taken_from(rollouts, NEVER_S)
    assert SOON_S * 0.5 < time.monotonic() - started < NEVER_S / 2
    assert len(taken.trajectories) == 1


async def test_take_returns_empty_when_its_time_is_over_and_loses_nothing() -> None:
    engine = FakeEngine(at_once=False)
    rollouts = worker(engine, samples=1)
    await rollouts.submit([tiny.prompt(0)])
    for _ in range(3):
        assert await taken_from(rollouts, 0.01) == NOTHING
    engine.finish("p0-e0-0")
    assert len((await taken_from(rollouts, NEVER_S)).trajectories) == 1


async def test_one_take_brings_everything_that_is_complete() -> None:
    rollouts = worker(FakeEngine(), together=False, samples=1)
    await rollouts.submit([tiny.prompt(i) for i in range(5)])
    await asyncio.sleep(SOON_S)
    assert len((await taken_from(rollouts, NEVER_S)).trajectories) == 5


async def test_a_take_that_lingers_gathers_what_comes_soon_after_the_first() -> None:
    engine = FakeEngine()
    rollouts = worker(engine, samples=1, together=False)
    await rollouts.submit([tiny.prompt(0)])
    taking = asyncio.create_task(taken_from(rollouts, NEVER_S, 0.2))
    await asyncio.sleep(0.02)
    await rollouts.submit([tiny.prompt(1)])
    assert {t.prompt_id for t in (await taking).trajectories} == {"p0", "p1"}


async def test_samples_for_evaluation_are_neither_scored_nor_taken() -> None:
    engine, rewards = FakeEngine(), FakeRewards()
    rollouts = worker(engine, rewards)
    drawn = await rollouts.sample([tiny.prompt(1), tiny.prompt(0), tiny.prompt(1, epoch=1)], 0.0, 9)
    assert [request.prompt for request, _ in drawn] == ["1+1=", "0+1=", "1+1="]
    assert [completion.text for _, completion in drawn] == [
        f"of {r.request_id}" for r in engine.requests
    ]
    assert (
        len({r.request_id for r in engine.requests}) == len({r.seed for r in engine.requests}) == 3
    )
    assert {r.temperature for r in engine.requests} == {0.0}
    assert rewards.calls == []
    assert await taken_from(rollouts, 0.01) == NOTHING


async def test_closing_ends_what_is_under_way_and_the_engine() -> None:
    engine = FakeEngine(at_once=False)
    rollouts = worker(engine)
    await rollouts.submit([tiny.prompt(0)])
    await rollouts.close()
    await asyncio.sleep(0)
    assert engine.closed
    assert await taken_from(rollouts, 0.01) == NOTHING


async def test_scored_each_a_call_holds_one_prompt_whenever_others_end() -> None:
    engine, rewards = FakeEngine(), FakeRewards()
    rollouts = worker(engine, rewards, scoring="each")
    await rollouts.submit([tiny.prompt(i) for i in range(3)])
    await take_all(rollouts, 3)
    assert rewards.calls == [[f"p{i}-e0-0", f"p{i}-e0-1"] for i in range(3)]


async def test_a_reset_leaves_nothing_of_what_was_submitted() -> None:
    engine = FakeEngine(at_once=False)
    rollouts = worker(engine, together=False)
    await rollouts.submit([tiny.prompt(i) for i in range(3)])
    for name in ("p0-e0-0", "p0-e0-1", "p1-e0-0"):
        engine.finish(name)
    await asyncio.sleep(0)
    await rollouts.reset()
    assert await taken_from(rollouts, SOON_S) == NOTHING
    await rollouts.submit([tiny.prompt(7)])
    for name in ("p7-e0-0", "p7-e0-1"):
        engine.finish(name)
    taken = await taken_from(rollouts, NEVER_S)
    assert [t.prompt_id for t in taken.trajectories] == ["p7", "p7"]
