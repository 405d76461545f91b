"""Whatever the group is doing when a rank dies: it is a LearnerLost, which new ranks mend."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.learner_group import LearnerGroup, LearnerLost
from cluster.placement import InProcessHost, Member, RoleFailed
from learner.trajectory_buffer import Batch

BATCH = Batch([("p0", 0)], [])
CALLS: dict[str, Callable[[LearnerGroup], Awaitable[Any]]] = {
    "start": lambda group: group.start(Path("nowhere")),
    "prepare_publish": lambda group: group.prepare_publish(None),
    "publish": lambda group: group.publish(1),
    "last_update": lambda group: group.last_update(False),
    "update": lambda group: group.update(BATCH, 1, 0, Path("nowhere")),
    "save_trajectories": lambda group: group.save_trajectories(BATCH, Path("nowhere")),
    "policy_logprobs": lambda group: group.policy_logprobs(None),
    "reference_logprobs": lambda group: group.reference_logprobs(None),
    "save": lambda group: group.save(Path("nowhere")),
    "wait_saved": lambda group: group.wait_saved(),
    "load": lambda group: group.load(Path("nowhere")),
}


class ActorDiedError(Exception):
    """Known by its name, as Ray's is."""


class DeadRank:
    def __getattr__(self, method: str) -> Any:
        def die(*_: Any) -> None:
            raise ActorDiedError

        return die


class Recorder:
    """A rank that says what it was asked, and in which order."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __getattr__(self, method: str) -> Any:
        async def answer(*_: Any) -> str:
            self.asked.append(method)
            await asyncio.sleep(0)
            return method

        return answer


class FullDisk:
    def save_trajectories(self, *_: Any) -> None:
        raise OSError("no space left on device")


def group_of(rank: Any, *, mended: bool = True) -> LearnerGroup:
    ranks = [Member("learner-0", rank)]
    again = (lambda _: ranks) if mended else None
    return LearnerGroup(ranks, InProcessHost(), timeout_s=5.0, again=again)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_a_rank_that_dies_is_a_lost_learner_in_every_call(
    call: Callable[[LearnerGroup], Awaitable[Any]],
) -> None:
    with pytest.raises(LearnerLost, match=r"learner-0: its process died"):
        await call(group_of(DeadRank()))


def test_every_call_is_tried() -> None:
    methods = {name for name in vars(LearnerGroup) if not name.startswith("_")}
    assert methods - {"restart"} == set(CALLS)


async def test_no_step_comes_between_the_weights_and_their_answer_to_the_probe() -> None:
    group = group_of(rank := Recorder())
    update, answering = await group.publish(1)
    await group.policy_logprobs(None)
    assert (update, await answering) == ("publish", "answer_probe")
    assert rank.asked == ["publish", "answer_probe", "policy_logprobs"]


async def test_without_new_ranks_or_with_an_error_of_the_call_it_is_not() -> None:
    for group in (group_of(DeadRank(), mended=False), group_of(FullDisk())):
        with pytest.raises(RoleFailed) as failed:
            await group.save_trajectories(BATCH, Path("nowhere"))
        assert not isinstance(failed.value, LearnerLost)
