"""Builds and wires a PPO run: who runs, and who talks to whom. How each starts is in deployment.py.

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

from typing import Any

from actors.prompts import PromptStream
from cluster.deployment import Deployment
from cluster.dropped import rolled_out
from cluster.evaluation import Evaluation
from cluster.generator_group import Replacement
from cluster.learner_group import LearnerGroup
from cluster.ledger import Ledger
from cluster.live_view import LiveView
from cluster.memory import checkpoint_bytes
from cluster.metrics_writer import MetricsWriter
from cluster.placement import InProcessHost, Member
from cluster.run import Run
from cluster.run_files import RunFiles
from cluster.supervisor import Supervisor


def wire(
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
    judge = rewards
    if config.judge is not None:
        judge = deployment.reward_service("judge", config.judge)
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
