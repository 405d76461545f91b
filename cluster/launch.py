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
import os
import signal
from pathlib import Path
from typing import Any

from actors.prompts import PromptStream
from actors.vllm_engine import CPU_ENGINE_ENV, ENGINE_ENV
from cluster import checkpoints
from cluster.config import BadInput, RunConfig
from cluster.doctor import Inputs, check_gpus, check_inputs, check_resume, gpus_of
from cluster.dropped import rolled_out, too_long
from cluster.evaluation import Evaluation
from cluster.learner_group import LearnerGroup
from cluster.ledger import Ledger
from cluster.live_view import LiveView
from cluster.metrics import MetricsWriter, RayMetricsSink
from cluster.placement import Host, InProcessHost, Member, RayHost
from cluster.roles import LearnerRole, RewardRole, RolloutRole
from cluster.run import Run
from cluster.run_files import RunFiles
from cluster.specs import learner_spec, rollout_spec
from cluster.summary import finish
from cluster.supervisor import Supervisor
from cluster.train import train
from learner.learner_spec import LEARNER_ENV
from reward_service.config import RewardServiceConfig

SHARED_MEMORY = Path("/dev/shm")


def run_ppo(config: RunConfig, *, in_process: bool, resume: bool, overwrite: bool) -> int:
    """The `train` command: check, launch, train, report. Returns the exit code."""
    started = _process_start()
    files = RunFiles(config)
    files.check(resume=resume, overwrite=overwrite)
    inputs = check_inputs(config)
    checkpoint, problems = checkpoints.newest_intact(files.folder) if resume else (None, [])
    if checkpoint is None and problems:
        raise BadInput(
            f"{problems[0]}, and no checkpoint before it is intact; start again with --overwrite"
        )
    if in_process and (config.generators.count, config.learner.ranks) != (1, 1):
        raise BadInput(
            "--in-process: one process holds one generator and one rank; set generators.count=1 "
            "learner.ranks=1"
        )
    if checkpoint is not None:
        check_resume(config, checkpoint.driver_state()["config"])
    host: Host = (
        InProcessHost() if in_process else RayHost(config.ray_address, f"raylign-{config.name}")
    )
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
        files.status("failed", error=str(error))
        raise
    finally:
        host.close()


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
    files.status("starting", step=0, num_steps=config.num_steps)
    members: list[Member] = []
    run = _wire(config, inputs, files, view, host, metrics, members, started)
    loop = asyncio.get_running_loop()
    for received in (signal.SIGTERM, signal.SIGINT):  # after ray.init, which sets its own
        loop.add_signal_handler(received, _ask_to_stop, run, received)
    try:
        await _bring_up(run, checkpoint)
        await train(run)
        await finish(run)
        return 128 + run.stopped_by if run.stopped_by is not None else 0
    finally:
        await run.supervisor.close()
        metrics.close()
        with contextlib.suppress(Exception):
            await asyncio.wait_for(host.stop(members), 15.0)


def _wire(
    config: RunConfig,
    inputs: Inputs,
    files: RunFiles,
    view: LiveView,
    host: Host,
    metrics: MetricsWriter,
    members: list[Member],
    started: float,
) -> Run:
    """Start every component at once (they load side by side) and hand each what it needs."""
    cuda = config.device == "cuda"
    logs = files.folder.resolve() / "logs"

    def deploy(name: str, kind: type, *args: Any, env: dict[str, str], gpus: float = 0) -> Member:
        member = host.start(name, kind, *args, env=env, gpus=gpus if cuda else 0)
        members.append(member)
        return member

    def service(name: str, reward: RewardServiceConfig) -> Member:
        merge = config.max_staleness > 0
        log = logs / f"{name}.log"
        args = (name, reward, merge, log)
        return deploy(name, RewardRole, *args, env=LEARNER_ENV, gpus=reward.num_gpus)

    rewards = service("reward", config.reward)
    generators = [
        deploy(
            f"generator-{index}",
            RolloutRole,
            rollout_spec(config, f"generator-{index}", logs),
            rewards.handle,
            env=ENGINE_ENV if cuda else CPU_ENGINE_ENV,
            gpus=config.generators.tensor_parallel_size,
        )
        for index in range(config.generators.count)
    ]
    spec = learner_spec(config, inputs)
    ranks = [
        deploy(
            f"learner-{rank}",
            LearnerRole,
            spec,
            rank,
            logs / f"learner-{rank}.log",
            env=LEARNER_ENV,
            gpus=1,
        )
        for rank in range(config.learner.ranks)
    ]
    learner = LearnerGroup(ranks, host, timeout_s=config.learner.timeout_s)
    samples = config.sampling.samples_per_prompt
    supervisor = Supervisor(
        generators,
        host,
        PromptStream(inputs.prompts, seed=config.seed, shuffle=config.prompts.shuffle),
        Ledger(prompts_per_step=config.prompts_per_step, max_staleness=config.max_staleness),
        rollout_timeout_s=config.generators.rollout_timeout_s,
        on_drop=lambda dropped: files.dropped(rolled_out(dropped, samples)),
    )
    evaluation = None
    if config.evaluation is not None:
        same = config.evaluation.scorer == config.reward.scorer
        judge = (
            rewards
            if same
            else service("judge", RewardServiceConfig(scorer=config.evaluation.scorer))
        )
        evaluation = Evaluation(
            config.evaluation,
            inputs.held_out,
            files.folder / "evaluation",
            seed=config.seed,
            supervisor=supervisor,
            learner=learner,
            judge=judge,
            rewards=rewards,
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
        evaluation=evaluation,
        prompts=inputs.prompts,
        started=started,
    )


async def _bring_up(run: Run, checkpoint: checkpoints.Checkpoint | None) -> None:
    """Load models, agree on the weights' layout, push and prove the first version, self-check."""
    run.view.stage("loading the models")
    loaded, _statuses = await asyncio.gather(
        run.learner.start(run.files.folder), run.supervisor.statuses(within=600.0)
    )
    if checkpoint is not None:
        await run.restore(checkpoint)
        run.view.note(f"resumed from the checkpoint of step {checkpoint.step}")
    run.files.event(
        "run_started", step=run.step, parameters=loaded[0]["parameters"], device=loaded[0]["device"]
    )
    members = [*run.supervisor.generators, *run.learner.ranks]
    segment = None
    if SHARED_MEMORY.is_dir() and await run.host.same_machine(members):
        _sweep_segments()
        segment = str(SHARED_MEMORY / f"raylign-{os.getpid()}-{run.config.name}")
    await run.supervisor.agree_layout(await run.learner.prepare_publish(segment))
    await run.publish(run.step)
    await run.proved()
    await run.self_check()
    if checkpoint is None:
        await run.evaluate()


def _ask_to_stop(run: Run, received: signal.Signals) -> None:
    run.view.note(f"{received.name}: finishing the step at hand, then a checkpoint")
    run.stopped_by = received
    run.stop.set()


def _sweep_segments() -> None:
    """Remove shared-memory segments of runs whose driver is gone (killed, so nobody cleaned up)."""
    import psutil

    for path in SHARED_MEMORY.glob("raylign-*-*"):
        owner = path.name.split("-")[1]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            with contextlib.suppress(OSError):
                path.unlink()


def _process_start() -> float:
    import psutil

    return psutil.Process().create_time()
