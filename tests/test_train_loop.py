"""The loop's order of verbs, seen by a run that only writes down what it is asked."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.config import CheckpointConfig, WarnConfig
from cluster.train import train
from learner.learner_spec import StepRefused


class FakeRun:
    """The verbs of a Run: each notes its name and the step at which it was called."""

    def __init__(
        self,
        num_steps: int,
        *,
        every: int = 100,
        step: int = 0,
        stop_at: int | None = None,
        stop_in_take_at: int | None = None,
        not_saved_at: tuple[int, ...] = (),
        refuse_at: tuple[int, ...] = (),
        evaluate_every: int | None = None,
        kl: list[float] | None = None,
    ) -> None:
        self.config = SimpleNamespace(
            num_steps=num_steps,
            checkpoint=CheckpointConfig(every=every),
            warn=WarnConfig(kl_to_ref=8.0),
        )
        self.step = step
        self.stop = asyncio.Event()
        self.calls: list[tuple[str, int]] = []
        self.logged: list[dict[str, float]] = []
        self.warnings: list[str] = []
        self.history: list[dict[str, float]] = []
        self.view = SimpleNamespace(stage=lambda text: None)
        self.supervisor = SimpleNamespace(resubmit=self._resubmit)
        self._stop_at = stop_at
        self._stop_in_take_at = stop_in_take_at
        self._not_saved_at = not_saved_at
        self._saved_step: int | None = None
        self._refuse_at = [*refuse_at]
        self._evaluate_every = evaluate_every
        self._kl = kl or [0.0] * num_steps

    def _note(self, verb: str) -> None:
        self.calls.append((verb, self.step))

    async def _resubmit(self) -> None:
        self._note("resubmit")

    async def take(self) -> Any:
        self._note("take")
        if self.step == self._stop_in_take_at:
            self.stop.set()
            return None
        return f"batch {self.step}"

    async def update(self, batch: Any) -> dict[str, float] | StepRefused:
        self._note("update")
        assert batch == f"batch {self.step}"
        if self.step in self._refuse_at:
            self._refuse_at.remove(self.step)
            return StepRefused(self.step + 1, "why", {})
        if self.step == self._stop_at:
            self.stop.set()
        return {"reward/score_mean": float(self.step), "learner/kl_to_ref": self._kl[self.step]}

    async def refuse(self, refused: StepRefused, batch: Any) -> None:
        self._note("refuse")
        assert (refused.step, batch) == (self.step + 1, f"batch {self.step}")

    async def publish(self, version: int) -> dict[str, float]:
        self._note("publish")
        assert version == self.step + 1
        return {"weights/push_s": 0.5}

    async def wait_push(self) -> dict[str, float]:
        self._note("wait_push")
        return {}

    def evaluation_due(self, last: bool) -> bool:
        return last or bool(self._evaluate_every and self.step % self._evaluate_every == 0)

    async def evaluate(self) -> dict[str, float]:
        self._note("evaluate")
        return {"evaluation/win_rate": 0.5}

    @property
    def meter(self) -> SimpleNamespace:
        return SimpleNamespace(spent=lambda activity, seconds: seconds)

    def log(self, metrics: dict[str, float]) -> None:
        self._note("log")
        self.history.append(metrics)

    def warn(self, message: str) -> None:
        self._note("warn")
        self.warnings.append(message)

    async def checkpoint(self) -> None:
        if self._saved_step == self.step:
            return
        self._note("checkpoint")
        if self.step not in self._not_saved_at:
            self._saved_step = self.step

    async def wait_checkpoint(self) -> None:
        self._note("wait_checkpoint")

    def steps_of(self, verb: str) -> list[int]:
        return [step for name, step in self.calls if name == verb]


async def trained(num_steps: int, **given: Any) -> FakeRun:
    run = FakeRun(num_steps, **given)
    await train(run)  # type: ignore[arg-type]
    return run


async def test_a_step_is_take_update_publish_log_and_the_last_one_is_checkpointed() -> None:
    run = await trained(2)
    assert run.calls == [
        ("resubmit", 0),
        ("take", 0),
        ("update", 0),
        ("publish", 0),
        ("log", 1),
        ("take", 1),
        ("update", 1),
        ("publish", 1),
        ("evaluate", 2),
        ("log", 2),
        ("checkpoint", 2),
        ("wait_push", 2),
        ("wait_checkpoint", 2),
    ]


async def test_every_step_is_logged_with_the_figures_of_all_its_parts() -> None:
    run = await trained(3)
    assert len(run.history) == 3
    for metrics in run.history:
        assert {
            "reward/score_mean",
            "learner/kl_to_ref",
            "weights/push_s",
            "time/rollout_wait_s",
            "time/update_s",
            "time/publish_s",
            "time/step_s",
        } <= metrics.keys()
    assert "evaluation/win_rate" in run.history[-1]


async def test_a_refused_step_takes_another_batch_and_publishes_nothing_until_then() -> None:
    run = await trained(2, refuse_at=(1, 1))
    assert [call for call in run.calls if call[1] == 1] == [
        ("log", 1),
        *(("take", 1), ("update", 1), ("refuse", 1)) * 2,
        ("take", 1),
        ("update", 1),
        ("publish", 1),
    ]
    assert run.steps_of("log") == [1, 2]


@pytest.mark.parametrize(
    ("num_steps", "every", "saved"),
    [(7, 3, [3, 6, 7]), (6, 3, [3, 6]), (5, 1, [1, 2, 3, 4, 5]), (4, 9, [4])],
)
async def test_checkpoints_come_at_their_interval_and_at_the_end(
    num_steps: int, every: int, saved: list[int]
) -> None:
    run = await trained(num_steps, every=every)
    assert run.steps_of("checkpoint") == saved


async def test_a_stop_in_the_middle_finishes_the_step_at_hand_and_checkpoints_it() -> None:
    run = await trained(9, stop_at=3)
    assert run.steps_of("log") == [1, 2, 3, 4]
    assert run.calls[-2:] == [("checkpoint", 4), ("wait_checkpoint", 4)]
    assert run.step == 4


async def test_a_stop_while_waiting_for_rollouts_checkpoints_the_step_before() -> None:
    run = await trained(9, stop_in_take_at=3)
    assert run.steps_of("update") == [0, 1, 2]
    assert [verb for verb, _ in run.calls[-4:]] == [
        "take",
        "wait_push",
        "checkpoint",
        "wait_checkpoint",
    ]
    assert run.step == 3


@pytest.mark.parametrize("every", [1, 2, 4, 100])
async def test_a_stop_saves_each_step_once(every: int) -> None:
    run = await trained(9, stop_at=3, every=every)
    saved = run.steps_of("checkpoint")
    assert saved[-1] == 4
    assert len(saved) == len(set(saved))


async def test_a_checkpoint_that_the_disk_refused_is_tried_again_when_the_next_is_due() -> None:
    run = await trained(9, every=3, not_saved_at=(3,))
    assert run.steps_of("update") == list(range(9))
    assert run.steps_of("checkpoint") == [3, 6, 9]


async def test_a_stop_after_such_a_checkpoint_tries_that_step_once_more() -> None:
    run = await trained(9, every=3, not_saved_at=(3,), stop_in_take_at=3)
    assert run.steps_of("checkpoint") == [3, 3]


async def test_a_stop_in_the_last_step_ends_like_any_other_run() -> None:
    run = await trained(4, stop_at=3)
    assert run.steps_of("checkpoint") == [4]


async def test_a_resumed_run_goes_on_at_its_step_after_sending_out_what_was_out() -> None:
    run = await trained(5, step=3)
    assert run.calls[:2] == [("resubmit", 3), ("take", 3)]
    assert run.steps_of("log") == [4, 5]


async def test_a_run_that_is_finished_does_nothing_more() -> None:
    run = await trained(5, step=5)
    assert run.steps_of("take") == []
    assert run.steps_of("checkpoint") == []


async def test_evaluation_falls_between_publishing_and_logging() -> None:
    run = await trained(5, evaluate_every=2)
    assert run.steps_of("evaluate") == [2, 4, 5]
    verbs = [name for name, step in run.calls if step == 2]
    assert verbs == ["evaluate", "log", "take", "update", "publish"]


async def test_a_rising_score_beyond_the_kl_bound_is_warned_of_once() -> None:
    run = await trained(5, kl=[1.0, 5.0, 9.0, 10.0, 11.0])
    assert run.steps_of("warn") == [3]
    assert "exploiting the reward" in run.warnings[0]
