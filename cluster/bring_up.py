"""How a run comes up: models loaded, one layout agreed on, a first version pushed and proved.

And how it goes on when the learner is lost: new ranks, the newest good checkpoint, and everything
that was made after it withdrawn, in the generators, the ledger and the files. Generators keep their
engines.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from cluster import checkpoints, run_state
from cluster.fit import SHARED_MEMORY
from cluster.learner_group import LearnerLost
from cluster.placement import RoleFailed
from cluster.run import Run
from cluster.self_check import self_check

READ_TIMEOUT_S = 3600.0  # of a checkpoint, to digest it


async def bring_up(run: Run, checkpoint: checkpoints.Checkpoint | None) -> None:
    """Load models, agree on the weights' layout, push and prove the first version, self-check."""
    run.view.stage("loading the models")
    loaded: list[dict[str, Any]]
    loaded, _ = await asyncio.gather(
        run.learner.start(run.files.folder), run.supervisor.group.wait_started()
    )
    if checkpoint is not None:
        await run_state.restore(run, checkpoint)
        run.view.note(f"resumed from the checkpoint of step {checkpoint.step}")
    _say_started(run, loaded)
    await _connect_weights(run)
    await self_check(run)
    run.meter.spent("starting", time.time() - run.started)
    if checkpoint is None:
        await run.evaluate()


async def recover(run: Run, lost: LearnerLost) -> None:
    """Go on from the newest intact checkpoint, or from the start, with new ranks. RoleFailed if there
    may be no more."""
    if run.learner.num_restarts == run.config.learner.max_restarts:
        raise RoleFailed(
            f"{lost}; it was restarted {run.learner.num_restarts} times, and learner.max_restarts "
            "allows no more"
        ) from lost
    started, published = time.perf_counter(), run.published
    stacks = {}
    if lost.kind == "silent":  # each waits for the others: which of them is the stuck one?
        stacks = {rank.name: await run.host.stack(rank) for rank in run.learner.ranks}
    run.files.event("learner_lost", reason=str(lost), stacks=stacks)
    run.view.note(f"WARNING: {lost}; going back to the last checkpoint with a new learner")
    for stack in stacks.values():
        run.view.note(stack)
    await run.forget_checkpoint()
    await run.supervisor.reset()
    restarted = await run.learner.restart(run.files.folder)
    checkpoint, problems = await _newest_intact(run.files.folder)
    for problem in problems:
        run.view.note(f"checkpoint not used: {problem}; going on from the one before it")
    if checkpoint is not None:
        await run_state.restore(run, checkpoint)
    else:
        run_state.start_over(run)
    _say_started(run, restarted)
    await _connect_weights(run)
    run.files.event(
        "learner_replaced",
        step=run.step,
        withdrawn_versions=[*range(run.step + 1, published + 1)],
        seconds=round(time.perf_counter() - started, 3),
    )


async def _newest_intact(folder: Path) -> tuple[checkpoints.Checkpoint | None, list[str]]:
    """In a thread, because it reads all of a checkpoint, and the heart must beat meanwhile."""
    reading = asyncio.to_thread(checkpoints.newest_intact, folder)
    try:
        return await asyncio.wait_for(reading, READ_TIMEOUT_S)
    except TimeoutError:
        raise RoleFailed(
            f"{folder}: its checkpoint was not read within {READ_TIMEOUT_S:g} s: is the disk stuck?"
        ) from None


async def _connect_weights(run: Run) -> None:
    group = run.supervisor.group
    roster = group.roster
    members = [*(roster.members[slot] for slot in roster.present()), *run.learner.ranks]
    stem, old = None, None
    if SHARED_MEMORY.is_dir() and await run.host.same_machine(members):
        old = f"raylign-{run.token}-{run.config.name}"
        stem = str(SHARED_MEMORY / f"{old}.{run.learner.num_restarts}")
    await group.agree_layout(await run.learner.prepare_publish(stem))
    await run.publish(run.step)
    await run.wait_push()
    for path in SHARED_MEMORY.glob(f"{old}.*") if old else ():
        if not str(path).startswith(f"{stem}-"):  # of a learner that was lost
            path.unlink(missing_ok=True)


def _say_started(run: Run, loaded: list[dict[str, Any]]) -> None:
    run.files.event(
        "run_started", step=run.step, parameters=loaded[0]["parameters"], device=loaded[0]["device"]
    )
