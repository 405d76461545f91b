"""What a checkpoint of a run holds, and how a run becomes the one that wrote it.

A synchronous run goes on at the last step's end: what is half rolled out is forgotten, and comes again,
the same, from the same cursor and seeds.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from actors.trajectory import keys_of
from cluster import checkpoints
from cluster.disk import refusal_of
from cluster.placement import RoleFailed
from learner.trajectory_buffer import TrajectoryBuffer

if TYPE_CHECKING:
    from cluster.run import Run


async def save(run: Run) -> bool:
    """False if the disk refused it; CheckpointFailed if it was the run's last one."""
    needed = checkpoints.expected_bytes(run.files.folder, run.checkpoint_bytes)
    try:
        await _write(run, needed)
    except (OSError, RoleFailed) as error:
        if (refusal := refusal_of(error)) is None:
            raise
        _give_up(run, refusal, needed)
        return False
    return True


async def restore(run: Run, checkpoint: checkpoints.Checkpoint) -> None:
    """Become the run that wrote `checkpoint`."""
    state = checkpoint.driver_state()
    await run.learner.load(checkpoint.learner)
    run.supervisor.stream.cursor = state["cursor"]
    run.supervisor.ledger.restore(state["ledger"])
    saved = pq.read_table(checkpoint.buffer)
    run.supervisor.buffer.add(dict.fromkeys(keys_of(saved)), run.host.share(saved))
    run.seconds = run.seconds or state["seconds"]
    run.rewind(checkpoint.step, state["num_dropped"])
    run.files.event("resumed", step=checkpoint.step)


def start_over(run: Run) -> None:
    """Become the run that has not done its first step: with a learner that is new."""
    run.supervisor.stream.cursor = 0
    run.rewind(0, run.num_too_long)


async def _write(run: Run, needed_bytes: int) -> None:
    if run.config.deterministic:
        await run.proved()
        await run.supervisor.settled()
    aside = checkpoints.begin(run.files.folder, run.step, needed_bytes)
    await run.learner.save(aside / checkpoints.LEARNER)
    (aside / checkpoints.DRIVER).write_text(json.dumps(_driver_state(run)))
    buffer = TrajectoryBuffer() if _forgets_leases(run) else run.supervisor.buffer
    await run.learner.save_trajectories(buffer.contents(), aside / checkpoints.BUFFER)
    checkpoints.commit(aside, run.step, run.config.checkpoint.keep)


def _give_up(run: Run, refusal: OSError, needed_bytes: int) -> None:
    given_up = checkpoints.give_up(run.files.folder, run.step, refusal, needed_bytes)
    with contextlib.suppress(OSError):  # the events are on the same disk
        run.files.event("checkpoint_failed", step=run.step, **asdict(given_up))
    if run.over:
        raise checkpoints.CheckpointFailed(str(given_up)) from refusal
    run.view.note(f"WARNING: {given_up}; the next one is tried when it is due")


def _forgets_leases(run: Run) -> bool:
    return run.config.max_staleness == 0 and len(run.supervisor.ledger) > 0


def _driver_state(run: Run) -> dict[str, Any]:
    """What the driver needs to go on."""
    supervisor = run.supervisor
    cursor, num_dropped = supervisor.stream.cursor, run.files.num_dropped()
    if _forgets_leases(run):
        cursor, num_dropped = run.boundary
        ledger = supervisor.ledger.without_leases()
    else:
        ledger = supervisor.ledger.state()
    return {
        "cursor": cursor,
        "ledger": ledger,
        "num_dropped": num_dropped,
        "seconds": run.seconds,
        "config": run.config.model_dump(mode="json"),
    }
