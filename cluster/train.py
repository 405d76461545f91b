"""The loop of PPO, on one screen: take, update, publish, log, checkpoint.

    take        waits for the supervisor until a batch of scored trajectories is ready
    update      the learner's PPO step on it: all epochs, minibatches and microbatches; if it is refused
                nothing has changed, and the same step takes another batch
    publish     new weights to every generator, each of which proves them before it samples on
    log         one line of metrics; a warning if the score rises while the KL leaves its bound
    checkpoint  everything needed to go on exactly here; copied now, and written beside the next steps

With max_staleness 0 these follow one another strictly. Above it, generators keep rolling out while
the learner learns: `take` finds most of its batch there already, and a push ends beside the next
update.
"""

from __future__ import annotations

import time

from cluster.run import Run
from cluster.run_warnings import kl_warning
from learner.learner_spec import StepRefused


async def train(run: Run) -> None:
    """From run.step to the last step, or to the end of the step in which a stop was asked for."""
    config = run.config
    await run.supervisor.resubmit()
    while run.step < config.num_steps and not run.stop.is_set():
        started = time.perf_counter()
        run.view.stage("training")
        batch = await run.take()
        if batch is None:
            break
        waited = run.meter.spent("waiting for rollouts", time.perf_counter() - started)

        updating = time.perf_counter()
        learned = await run.update(batch)
        update_s = run.meter.spent("update", time.perf_counter() - updating)
        if isinstance(learned, StepRefused):
            await run.refuse(learned, batch)
            continue
        metrics = learned | {"time/update_s": update_s}
        publishing = time.perf_counter()
        metrics |= await run.publish(run.step + 1)
        run.step += 1
        metrics["time/publish_s"] = run.meter.spent("publish", time.perf_counter() - publishing)

        last = run.step == config.num_steps
        if run.evaluation_due(last):
            metrics |= await run.evaluate()
        metrics["time/rollout_wait_s"] = waited
        metrics["time/step_s"] = time.perf_counter() - started
        run.log(metrics)
        if warning := kl_warning(run.history, config.warn):
            run.warn(warning)
        if last or run.step % config.checkpoint.every == 0:
            await run.checkpoint()
    await run.wait_push()
    if run.stop.is_set():
        await run.checkpoint()
    await run.wait_checkpoint()
