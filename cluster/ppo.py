"""The `train` command: check, launch, train, report.

    checks, none of which loads a model --> a host --> wire (launch.py) --> bring up --> the loop (train.py)

Whatever ends it, what was started is stopped, and the run's status says why.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal

from cluster import checkpoints
from cluster.bring_up import bring_up, recover
from cluster.config import BadInput, RunConfig
from cluster.deployment import Deployment
from cluster.doctor import Inputs, check_inputs, check_resume, check_same_prompts
from cluster.dropped import too_long
from cluster.gpus import check_gpus, gpus_of
from cluster.heartbeat import BEAT_S
from cluster.hosting import hosting
from cluster.launch import wire
from cluster.learner_group import LearnerLost
from cluster.live_view import LiveView
from cluster.metrics_writer import MetricsWriter, RayMetricsSink
from cluster.placement import Host, InProcessHost
from cluster.reward_watch import watch_rewards
from cluster.run import Run
from cluster.run_files import RunFiles
from cluster.run_lock import one_driver
from cluster.scale import scaled, watch_scale
from cluster.stop import abandon, ask_to_stop
from cluster.summary import finish
from cluster.train import train

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
    run = wire(deployment, files, view, metrics, started)
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


def _process_start() -> float:
    import psutil

    return psutil.Process().create_time()
