"""A stop: the end of the step at hand, or of the grace, or of patience; then the last checkpoint stands."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.weight_update import ProbeAnswer, WeightUpdate
from cluster import deployment, stop
from tests import test_secrets
from tests.test_secrets import TalkativeEngine, config, raylign, world  # noqa: F401  (fixtures)


class Run:
    """What ask_to_stop sees of one."""

    def __init__(self, grace_s: float, *, rolling_out: bool = True) -> None:
        self.config = SimpleNamespace(stop_grace_s=grace_s)
        self.stop, self.stopped_by, self.stop_asked_at = asyncio.Event(), None, 0.0
        self.said: list[str] = []
        self.view = SimpleNamespace(note=self.said.append)
        self.rolling_out = rolling_out


def ask(run: Run, work: asyncio.Task[Any]) -> None:
    stop.ask_to_stop(run, signal.SIGTERM, work)  # type: ignore[arg-type]


def endless() -> asyncio.Task[None]:
    return asyncio.create_task(asyncio.sleep(60))


async def test_the_step_has_the_grace_and_no_more() -> None:
    run, work = Run(0.2), endless()
    ask(run, work)
    assert run.stop.is_set()
    assert run.stopped_by == signal.SIGTERM
    assert len(run.said) == 1
    await asyncio.sleep(0.1)
    assert not work.done()
    await asyncio.wait([work], timeout=5)
    assert work.cancelled()


async def test_before_the_first_step_there_is_nothing_to_wait_for() -> None:
    run, work = Run(60, rolling_out=False), endless()
    ask(run, work)
    assert run.stopped_by == signal.SIGTERM
    await asyncio.wait([work], timeout=5)
    assert work.cancelled()


async def test_a_second_signal_ends_it_now_but_not_the_same_one_told_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, work = Run(60), endless()
    ask(run, work)
    ask(run, work)
    await asyncio.sleep(0)
    assert not work.cancelling()
    monkeypatch.setattr(stop, "AGAIN_S", 0.0)
    ask(run, work)
    await asyncio.wait([work], timeout=5)
    assert work.cancelled()


class StuckEngine(TalkativeEngine):
    """Is asked for a stop while it takes the second step's weights, for which it takes for ever."""

    async def receive_weights(self, update: WeightUpdate) -> dict[str, float]:
        if update.version == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(3600)
        return await super().receive_weights(update)

    async def receive_answer(self, answer: ProbeAnswer) -> None:
        return


def test_a_run_that_is_stuck_ends_within_the_grace_and_goes_on_from_its_checkpoint(
    world: Path,  # noqa: F811
    policy: Path,
    raylign: Callable[..., tuple[int, str]],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (world / "constant.py").write_text("def score(requests):\n    return [1.0] * len(requests)")
    monkeypatch.syspath_prepend(str(world))
    scorer = {"kind": "function", "function": "constant:score"}
    path = config(world, policy, {"reward.scorer": scorer, "stop_grace_s": 0.5})
    with monkeypatch.context() as patch:
        patch.setattr(test_secrets, "TalkativeEngine", StuckEngine)
        code, said = raylign("train", path, "--in-process")
    assert code == 143, said
    assert "SIGTERM: finishing the step at hand" in said
    assert "ended before the step at hand was done; --resume" in said
    assert [p.name for p in (world / "runs/tiny/checkpoints").iterdir()] == ["step-000001"]
    assert "stopped" in raylign("status", "tiny")[1]
    assert raylign("audit", "tiny")[0] == 0
    code, said = raylign("train", path, "--in-process", "--resume")
    assert code == 0, said
    assert "resumed from the checkpoint of step 1" in said
    code, said = raylign("audit", "tiny")
    assert code == 0, said
    assert deployment.RolloutRole is test_secrets.TalkativeRole
