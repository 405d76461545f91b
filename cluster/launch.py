"""Builds and wires a PPO run. Topology is here and nowhere else.

        prompts (driver)                          reward service    judge (evaluation only)
            |  admit: as many as the                    ^  |             ^
            v  staleness bound allows     <prompt,      |  | scores      |
   +--------------------+                 completion>   |  v             |
   | rollout worker 0.. | ----------------------------------             |
   |  + vLLM generator  | -- trajectories --> buffer (driver)            |
   +--------------------+                       |  take                  |
            ^                                   v                        |
            |  weights: version,        +------------------+             |
            |  digest, probe            | learner rank 0.. |             |
            +-------------------------- |  FSDP: PPO step  |             |
                                        +------------------+             |
   held-out samples of the generators -----------------------------------+

who               consumes        produces       waits for               is unblocked by
rollout workers   prompts         trajectories   completions, scores     engine, reward service
reward service    requests        scores         a full batch or time    rollout workers
driver            trajectories    batches        a ready step            rollout workers
learner           batches         weights        a batch                 driver
generators        weights         completions    nothing, in flight      learner
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from typing import Any

from actors.prompts import PromptStream
from cluster import checkpoints
from cluster.bring_up import bring_up, recover
from cluster.config import BadInput, RunConfig
from cluster.deployment import Deployment
from cluster.doctor import Inputs, check_inputs, check_resume, check_same_prompts
from cluster.dropped import rolled_out, too_long
from cluster.evaluation import Evaluation
from cluster.generator_group import Replacement
from cluster.gpus import check_gpus, gpus_of
from cluster.heartbeat import BEAT_S
from cluster.hosting import hosting
from cluster.learner_group import LearnerGroup, LearnerLost
from cluster.ledger import Ledger
from cluster.live_view import LiveView
from cluster.memory import checkpoint_bytes
from cluster.metrics_writer import MetricsWriter, RayMetricsSink
from cluster.placement import Host, InProcessHost, Member
from cluster.reward_watch import watch_rewards
from cluster.run import Run
from cluster.run_files import RunFiles
from cluster.run_lock import one_driver
from cluster.scale import scaled, watch_scale
from cluster.stop import abandon, ask_to_stop
from cluster.summary import finish
from cluster.supervisor import Supervisor
from cluster.train import train
from reward_service.config import RewardServiceConfig

LAST_CHECKPOINT_S = 60.0


def run_ppo(
    config: RunConfig,
    *,
    in_process: bool,
    resume: bool,
    overwrite: bool,
    trust_checkpoint: bool = False,
) -> int:
    """The `train` command: check, launch, train, report. Returns the exit code."""
    started = _process_start()
    with one_driver(config.run_dir), hosting(config, in_process=in_process) as open_host:
        files = RunFiles(config)
        files.check(resume=resume, overwrite=overwrite)
        if resume:
            config = scaled(config, files.folder)
        inputs = check_inputs(config)
        checkpoint, problems = (
            _checkpoint_of(config, inputs, files, trusted=trust_checkpoint)
            if resume
            else (None, [])
        )
        if in_process and (config.generators.count, config.learner.ranks) != (1, 1):
            raise BadInput(
                "--in-process: one process holds one generator and one rank; set generators.count=1 "
                "learner.ranks=1"
            )
        host = open_host()
        try:
            check_gpus(gpus_of(config), host.num_gpus)
            files.create(overwrite=overwrite)
            with LiveView(config.name, config.num_steps) as view:
                for problem in problems:
                    view.note(f"checkpoint not used: {problem}; going on from the one before it")
                return asyncio.run(_run(config, inputs, files, view, host, checkpoint, started))
        except BadInput:
            raise
        except BaseException as error:
            with contextlib.suppress(OSError):  # or a full disk would hide what failed
                files.status("failed", error=str(error))
            raise


def _checkpoint_of(
    config: RunConfig, inputs: Inputs, files: RunFiles, *, trusted: bool
) -> tuple[checkpoints.Checkpoint | None, list[str]]:
    """The one to go on from, and what is wrong with those after it. BadInput if none can be used."""
    checkpoint, problems = checkpoints.newest_intact(files.folder)
    if checkpoint is None and problems:
        raise BadInput(
            f"{problems[0]}, and no checkpoint before it is intact; start again with --overwrite"
        )
    if checkpoint is not None:
        if not trusted:
            checkpoints.check_origin(checkpoint.path)
        state = checkpoint.driver_state()
        check_resume(config, state["config"])
        check_same_prompts(config, inputs.prompts, state)
    return checkpoint, problems


async def _run(
    config: RunConfig,
    inputs: Inputs,
    files: RunFiles,
    view: LiveView,
    host: Host,
    checkpoint: checkpoints.Checkpoint | None,
    started: float,
) -> int:
    sinks = [] if isinstance(host, InProcessHost) else [RayMetricsSink(config.name)]
    resume_step = checkpoint.step if checkpoint is not None else files.start_over()
    metrics = MetricsWriter(files.folder, resume_step=resume_step, sinks=sinks)
    if checkpoint is None and inputs.dropped:
        files.dropped([too_long(prompt_id) for prompt_id in inputs.dropped])
        view.note(f"{len(inputs.dropped)} prompts are too long for the context and dropped")
    if inputs.too_little_memory:
        view.note(f"WARNING: {inputs.too_little_memory}")
    files.status("starting", step=0, num_steps=config.num_steps)
    deployment = Deployment(config, inputs, host, files.folder.resolve() / "logs")
    run = _wire(deployment, files, view, metrics, started)
    work = asyncio.create_task(_work(run, checkpoint))
    loop = asyncio.get_running_loop()
    for received in (signal.SIGTERM, signal.SIGINT):  # after ray.init, which sets its own
        loop.add_signal_handler(received, ask_to_stop, run, received, work)
    watches = [
        asyncio.create_task(watch)
        for watch in (watch_rewards(run), watch_scale(run), files.beat(BEAT_S))
    ]
    for watch in watches:
        run.supervisor.watch(watch)
    try:
        await work
    except asyncio.CancelledError:
        if run.stopped_by is None:
            raise
        abandon(run)
    finally:
        with contextlib.suppress(Exception):  # begun is worth ending, whatever else has failed
            await asyncio.wait_for(run.wait_checkpoint(), LAST_CHECKPOINT_S)
        await run.forget_checkpoint()
        for watch in watches:
            watch.cancel()
        await run.supervisor.close()
        metrics.close()
        with contextlib.suppress(Exception):
            await asyncio.wait_for(host.stop(deployment.members), 15.0)
    return 128 + run.stopped_by if run.stopped_by is not None else 0


async def _work(run: Run, checkpoint: checkpoints.Checkpoint | None) -> None:
    await bring_up(run, checkpoint)
    await _train(run)
    await finish(run)


async def _train(run: Run) -> None:
    """Train to the end; a learner that is lost is replaced."""
    lost: LearnerLost | None = None
    while lost is not None or not run.over:
        try:
            if lost is not None:
                await recover(run, lost)
                lost = None
            await train(run)
        except LearnerLost as again:
            lost = again


def _wire(
    deployment: Deployment, files: RunFiles, view: LiveView, metrics: MetricsWriter, started: float
) -> Run:
    """Start every component at once (they load side by side) and hand each what it needs."""
    config, inputs, host = deployment.config, deployment.inputs, deployment.host
    rewards = deployment.reward_service("reward", config.reward)
    generators = deployment.generators(rewards)
    one_process = isinstance(host, InProcessHost)  # where nothing dies alone
    learner = LearnerGroup(
        deployment.learner_ranks(),
        host,
        timeout_s=config.learner.timeout_s,
        again=None if one_process else deployment.learner_ranks,
    )
    replacement = Replacement(
        start=lambda slot, attempt: deployment.generator(rewards, slot, attempt),
        last_update=learner.last_update,
        max_restarts=config.generators.max_restarts,
        on_event=lambda event, **facts: _generator_event(files, view, event, facts),
    )
    samples = config.sampling.samples_per_prompt
    supervisor = Supervisor(
        generators,
        host,
        PromptStream(inputs.prompts, seed=config.seed, shuffle=config.prompts.shuffle),
        Ledger(
            prompts_per_step=config.prompts_per_step,
            max_staleness=config.max_staleness,
            in_order=config.deterministic,
        ),
        rollout_timeout_s=config.generators.rollout_timeout_s,
        ping_timeout_s=config.ping_timeout_s,
        on_drop=lambda dropped: files.dropped(rolled_out(dropped, samples)),
        replacement=None if one_process else replacement,
    )
    return Run(
        config=config,
        host=host,
        files=files,
        metrics=metrics,
        view=view,
        supervisor=supervisor,
        learner=learner,
        rewards=rewards,
        evaluation=_evaluation(deployment, files, supervisor, learner, rewards),
        prompts=inputs.prompts,
        started=started,
        num_too_long=len(inputs.dropped),
        checkpoint_bytes=checkpoint_bytes(config, inputs.num_parameters),
    )


def _evaluation(
    deployment: Deployment,
    files: RunFiles,
    supervisor: Supervisor,
    learner: LearnerGroup,
    rewards: Member,
) -> Evaluation | None:
    config = deployment.config
    if config.evaluation is None:
        return None
    if config.evaluation.scorer == config.reward.scorer:
        judge = rewards
    else:
        service = RewardServiceConfig(scorer=config.evaluation.scorer)
        judge = deployment.reward_service("judge", service)
    return Evaluation(
        config.evaluation,
        deployment.inputs.held_out,
        files.folder / "evaluation",
        seed=config.seed,
        supervisor=supervisor,
        learner=learner,
        judge=judge,
        rewards=rewards,
        retries=config.reward,
    )


def _generator_event(files: RunFiles, view: LiveView, event: str, facts: dict[str, Any]) -> None:
    files.event(event, **facts)
    if event == "generator_lost":
        view.note(f"WARNING: {facts['reason']}; starting another in its place")
        if facts["stack"]:
            view.note(facts["stack"])
    else:
        view.note(f"{facts['generator']} is there, {facts['seconds']:g} s after the loss")


def _process_start() -> float:
    import psutil

    return psutil.Process().create_time()
