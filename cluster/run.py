"""A PPO run: its wired components, and the verbs that the loop in train.py is made of."""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass, field

from actors.trajectory import Prompt
from actors.weight_update import ProbeAnswer, WeightUpdate
from cluster import dropped, replay_bundle, run_state
from cluster.config import RunConfig
from cluster.evaluation import Evaluated, Evaluation
from cluster.learner_group import LearnerGroup
from cluster.live_view import LiveView
from cluster.metrics_writer import MetricsWriter
from cluster.placement import Host, Member, RoleFailed
from cluster.role_meter import Interval, RoleMeter
from cluster.run_files import RunFiles
from cluster.supervisor import Supervisor
from learner.learner_spec import StepRefused
from learner.trajectory_buffer import Batch

HISTORY = 16  # steps


@dataclass
class Run:
    """Everything of one run. `step` counts finished steps and is the published policy_version."""

    config: RunConfig
    host: Host
    files: RunFiles
    metrics: MetricsWriter
    view: LiveView
    supervisor: Supervisor
    learner: LearnerGroup
    rewards: Member
    evaluation: Evaluation | None
    prompts: list[Prompt]
    started: float  # unix time of the command
    checkpoint_bytes: int = 0  # estimate of the first one
    num_too_long: int = 0  # prompts that were dropped before the first step
    # Of this driver alone: in shared memory the names of others' segments may lie, of other containers too.
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    stopped_by: int | None = None  # the signal's number
    stop_asked_at: float = 0.0  # time.monotonic
    step: int = 0
    rolling_out: bool = False  # prompts have gone out, since this process began
    published: int = 0  # the newest version that was written for the generators
    saved_step: int | None = None  # of the newest checkpoint that this process has written
    evaluations: list[Evaluated] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)  # metrics of the last steps
    boundary: tuple[int, int] = (0, 0)  # (cursor, drops) at the end of the last step
    meter: RoleMeter = field(init=False)
    _refused_in_a_row: int = 0
    _saving: asyncio.Task[None] | None = None  # the checkpoint that is being written

    def __post_init__(self) -> None:
        ping_s = self.config.ping_timeout_s
        self.meter = RoleMeter(self.supervisor, self.rewards, ping_s=ping_s)

    # ---- the verbs of a step

    async def take(self) -> Batch | None:
        """Lease what may be leased, then wait for the next batch; None if a stop was asked for."""
        self._doing("learner", "waiting for rollouts")
        if self._saving is not None and self._saving.done():
            await self.wait_checkpoint()  # raises what it failed of
        await self.meter.begin()
        self.rolling_out = True
        self.boundary = (self.supervisor.stream.cursor, self.files.num_dropped())
        await self.supervisor.admit()
        return await self.supervisor.take(self.step, self.stop)

    async def update(self, batch: Batch) -> dict[str, float] | StepRefused:
        """The learner's PPO step; meanwhile the generators are asked what they did."""
        self._doing("learner", f"update of step {self.step + 1}")
        folder = self.files.folder / "trajectories"
        learned, past = await asyncio.gather(
            self.learner.update(batch, self.step + 1, self.step, folder), self._past()
        )
        if isinstance(learned, StepRefused):
            return learned
        self._refused_in_a_row = 0
        seconds = self.meter.lap()
        return {
            **learned,
            "rollout/tokens_per_s": learned["rollout/completion_tokens"] / seconds,
            "rollout/samples_per_s": self.config.batch_size / seconds,
            "rollout/generators": float(len(past.generators)),
            "rollout/generator_busy_share": past.busy_share,
            "reward/dropped": float(self.supervisor.ledger.num_dropped),
        }

    async def refuse(self, refused: StepRefused, batch: Batch) -> None:
        """Give up the batch of a refused step, and keep what replays it. The weights are as they were.
        After `ppo.refuse.max_in_a_row` of them: a checkpoint, and RoleFailed."""
        self._refused_in_a_row += 1
        self._doing("learner", f"refused step {refused.step}")
        await self.wait_checkpoint()  # the learner writes one thing at a time
        how = await replay_bundle.leave(self.config, self.learner, batch, refused, self.step)
        reason = f"step {refused.step} refused: {refused.reason}"
        self.supervisor.ledger.refuse(batch.keys)
        samples = self.config.sampling.samples_per_prompt
        self.files.dropped(dropped.refused(batch.keys, samples, reason))
        self.files.event("step_refused", step=self.step, reason=reason, replay=how)
        self.view.note(f"WARNING: {reason}; its batch is dropped ({how})")
        if self._refused_in_a_row == self.config.ppo.refuse.max_in_a_row:
            await self.checkpoint()
            await self.wait_checkpoint()
            saved = "a" if self.saved_step == self.step else "no"
            raise RoleFailed(
                f"{reason}; that is {self._refused_in_a_row} in a row ({how}); there is {saved} checkpoint "
                f"of step {self.step}, from which --resume goes on with other prompts"
            )

    async def publish(self, version: int) -> dict[str, float]:
        """Write the learner's weights as `version` and push them to the generators.

        Synchronous runs wait until every generator has proved them. Otherwise the learner goes on
        and the push ends beside its next step; the metrics are then those of the push before."""
        metrics = await self.wait_push()  # of the last push, which must have ended
        self._doing("learner", f"publishing version {version}")
        started = time.perf_counter()
        update, answering = await self.learner.publish(version)
        self._event_of(update, time.perf_counter() - started)
        self.supervisor.begin_push(self._pushed(update, answering, started))
        return await self.wait_push() if self.config.max_staleness == 0 else metrics

    async def wait_push(self) -> dict[str, float]:
        """Wait until every generator has proved what was last published; metrics of that push."""
        return await self.supervisor.wait_push()

    async def _pushed(
        self, update: WeightUpdate, answering: asyncio.Future[ProbeAnswer], started: float
    ) -> dict[str, float]:
        proofs = await self.supervisor.push(update, answering)
        seconds = time.perf_counter() - started
        if self.config.max_staleness and self.rolling_out:
            await self.supervisor.admit()
        return {
            "weights/push_s": seconds,
            "weights/bytes": float(update.payload_bytes or self.learner.push_bytes),
            "weights/probe_difference_max": max(
                (proof["probe_difference"] for proof in proofs), default=0.0
            ),
        }

    def _event_of(self, update: WeightUpdate, seconds: float) -> None:
        self.published = update.version
        self.files.event(
            "weights_published",
            version=update.version,
            step=update.version,
            digest=update.digests[0] if len(update.digests) == 1 else list(update.digests),
            seconds=round(seconds, 4),
        )

    async def checkpoint(self) -> None:
        """Begin one of the state as it is now, if the newest is not of this step; it is written beside
        what comes next. One that the disk refuses is given up, and the next is tried when it is due; but
        the run cannot go on without its last one: then CheckpointFailed."""
        started = time.perf_counter()
        await self.wait_checkpoint()
        if self.saved_step == self.step:
            return
        save = run_state.Save(self)
        if await save.begin():
            stall_s = self.meter.spent("checkpoint", time.perf_counter() - started)
            self._saving = asyncio.create_task(self._end(save, started, stall_s))

    async def wait_checkpoint(self) -> None:
        """Wait until the checkpoint that was begun last is written, or given up. Cancelling the wait does
        not stop the writing."""
        if (saving := self._saving) is None:
            return
        try:
            await asyncio.shield(saving)
        finally:
            if saving.done() and self._saving is saving:
                self._saving = None

    async def forget_checkpoint(self) -> None:
        """Wait no more for one whose learner is lost."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.cancel()
            await asyncio.gather(saving, return_exceptions=True)

    async def _end(self, save: run_state.Save, started: float, stall_s: float) -> None:
        if await save.end():
            self.saved_step = save.step
            seconds = round(time.perf_counter() - started, 3)
            self.files.event(
                "checkpoint_saved", step=save.step, seconds=seconds, stall_s=round(stall_s, 4)
            )

    async def evaluate(self) -> dict[str, float]:
        """Held-out evaluation of the published policy; {} without one in the config."""
        if self.evaluation is None:
            return {}
        await self.wait_push()
        started = time.perf_counter()
        self.view.stage("held-out evaluation")
        if self.step == 0:
            await self.evaluation.start()
        evaluated = await self.evaluation.run(self.step)
        self.evaluations.append(evaluated)
        self.files.event("evaluation", step=self.step, **_rounded(evaluated.metrics))
        self.view.note(_evaluation_line(evaluated))
        seconds = self.meter.spent("evaluation", time.perf_counter() - started)
        return evaluated.metrics | {"time/evaluate_s": seconds}

    def evaluation_due(self, last: bool) -> bool:
        every = self.config.evaluation.every if self.config.evaluation else None
        return last or (every is not None and self.step % every == 0)

    def log(self, metrics: dict[str, float]) -> None:
        """The step's line of metrics.jsonl, and what the people at the terminal see of it."""
        self.history = [*self.history, metrics][-HISTORY:]
        self.view.step(self.metrics.write(self.step, metrics))
        self.files.status(
            "running",
            step=self.step,
            num_steps=self.config.num_steps,
            generators=self.supervisor.num_generators(),
        )

    def warn(self, message: str) -> None:
        self.files.event("warning", step=self.step, message=message)
        self.view.note(f"WARNING: {message}")

    # ---- its state

    @property
    def over(self) -> bool:
        return self.step == self.config.num_steps or self.stop.is_set()

    def rewind(self, step: int, num_dropped: int) -> None:
        """Take files and figures back to the end of `step`."""
        self.step = step
        self.saved_step = None
        self._refused_in_a_row = 0
        self.files.rewind(step, num_dropped)
        self.metrics.rewind(step)
        self.history.clear()
        self.evaluations = [one for one in self.evaluations if one.step <= step]

    async def _past(self) -> Interval:
        past = await self.meter.interval()
        for name, status in past.generators.items():
            self._doing(name, f"{status['running']} running, {status['waiting']} waiting")
        return past

    def _doing(self, role: str, what: str) -> None:
        """Tell the live view what a role is doing."""
        self.view.roles({role: what})


def _rounded(metrics: dict[str, float]) -> dict[str, float]:
    return {name.removeprefix("evaluation/"): round(value, 4) for name, value in metrics.items()}


def _evaluation_line(evaluated: Evaluated) -> str:
    figures = "  ".join(
        f"{name} {value:.3f}" for name, value in _rounded(evaluated.metrics).items()
    )
    return f"held-out, step {evaluated.step}: {figures}"
