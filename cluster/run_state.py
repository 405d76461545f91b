"""What a checkpoint of a run holds, and how a run becomes the one that wrote it.

A synchronous run goes on at the last step's end: what is half rolled out is forgotten, and comes again,
the same, from the same cursor and seeds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from actors.trajectory import keys_of, packed
from cluster import checkpoints
from cluster.disk import refusal_of
from cluster.placement import RoleFailed
from learner.trajectory_buffer import TrajectoryBuffer

if TYPE_CHECKING:
    from cluster.run import Run

COMMIT_TIMEOUT_S = 600.0  # to digest and to make durable


class Save:
    """A checkpoint of `run` as it was at one step's end, written beside the steps after it.

    `begin` copies what is to be saved, `end` waits until it is on the disk and gives it its name. Both
    return False if the disk refused it: then it is given up, and the run goes on; or CheckpointFailed
    if the run is over and it was the last one.
    """

    def __init__(self, run: Run) -> None:
        self.step = run.step
        self._run = run
        self._refused = False
        self._needed = checkpoints.expected_bytes(run.files.folder, run.checkpoint_bytes)

    async def begin(self) -> bool:
        run = self._run
        with self._unless_refused():
            if run.config.deterministic:
                await run.wait_push()
                await run.supervisor.wait_settled()
            self._aside = checkpoints.begin(run.files.folder, self.step, self._needed)
            (self._aside / checkpoints.DRIVER).write_text(json.dumps(_driver_state(run)))
            buffer = TrajectoryBuffer() if _forgets_leases(run) else run.supervisor.buffer
            await run.learner.save_trajectories(buffer.contents(), self._aside / checkpoints.BUFFER)
            await run.learner.save(self._aside / checkpoints.LEARNER)  # last: it is only begun here
        return not self._refused

    async def end(self) -> bool:
        with self._unless_refused():
            await self._run.learner.wait_saved()
            await self._commit()
        return not self._refused

    async def _commit(self) -> None:
        """Give the checkpoint its name, to the end, even if the caller is cancelled."""
        keep = self._run.config.checkpoint.keep
        commit = asyncio.to_thread(checkpoints.commit, self._aside, self.step, keep)
        committing = asyncio.create_task(commit)
        try:
            await asyncio.wait([committing], timeout=COMMIT_TIMEOUT_S)
        except asyncio.CancelledError:
            await asyncio.wait([committing], timeout=COMMIT_TIMEOUT_S)
            raise
        if not committing.done():
            raise RoleFailed(
                f"{self._aside}: not committed within {COMMIT_TIMEOUT_S:g} s: is the disk stuck?"
            )
        if (error := committing.exception()) is not None:
            raise error

    @contextlib.contextmanager
    def _unless_refused(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RoleFailed) as error:
            if (refusal := refusal_of(error)) is None:
                raise
            self._refused = True
            self._give_up(refusal)

    def _give_up(self, refusal: OSError) -> None:
        run = self._run
        given_up = checkpoints.give_up(run.files.folder, self.step, refusal, self._needed)
        with contextlib.suppress(OSError):  # the events are on the same disk
            run.files.event("checkpoint_failed", step=self.step, **asdict(given_up))
        if run.over and run.step == self.step:
            raise checkpoints.CheckpointFailed(str(given_up)) from refusal
        run.view.note(f"WARNING: {given_up}; the next one is tried when it is due")


async def restore(run: Run, checkpoint: checkpoints.Checkpoint) -> None:
    """Become the run that wrote `checkpoint`."""
    state = checkpoint.driver_state()
    await run.learner.load(checkpoint.learner)
    run.supervisor.stream.cursor = state["cursor"]
    run.supervisor.ledger.restore(state["ledger"])
    saved = pq.read_table(checkpoint.buffer)
    run.supervisor.buffer.add(dict.fromkeys(keys_of(saved)), run.host.share(packed(saved)))
    run.meter.seconds = run.meter.seconds or state["seconds"]
    run.rewind(checkpoint.step, state["num_dropped"])
    run.files.event("resumed", step=checkpoint.step)


def start_over(run: Run) -> None:
    """Become the run that has not done its first step: with a learner that is new."""
    run.supervisor.stream.cursor = 0
    run.rewind(0, run.num_too_long)


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
        "prompts_digest": supervisor.stream.digest,
        "ledger": ledger,
        "num_dropped": num_dropped,
        "seconds": run.meter.seconds,
        "config": run.config.model_dump(mode="json"),
    }
