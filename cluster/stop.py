"""A stop that was asked for by SIGTERM or SIGINT: the end of the step at hand, or of the grace for it."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.run import Run

# One Ctrl-C may come twice: from the terminal, and from a parent that passes it on.
AGAIN_S = 1.0
# For what is left when the grace has ended: a checkpoint that is being written, and closing.
ENDING_S = 90.0


def ask_to_stop(run: Run, received: signal.Signals, work: asyncio.Task[Any]) -> None:
    """First the run is asked to end after the step at hand; once more, when that takes too long, or when
    there has been none yet, `work` is cancelled."""
    if run.stopped_by is not None:
        if time.monotonic() - run.stop_asked_at > AGAIN_S:
            work.cancel()
        return
    run.stopped_by, run.stop_asked_at = received, time.monotonic()
    if not run.rolling_out:
        run.view.note(f"{received.name}: ended before the first step")
        work.cancel()
    else:
        grace_s = run.config.stop_grace_s
        run.view.note(
            f"{received.name}: finishing the step at hand, for which there are {grace_s:g} s, then a "
            "checkpoint; a second signal ends it now"
        )
        run.stop.set()
        asyncio.get_running_loop().call_later(grace_s, work.cancel)


def abandon(run: Run) -> None:
    """Say that the step at hand was not waited for."""
    run.files.event("run_finished", status="stopped", step=run.step)
    run.files.status("stopped", step=run.step, num_steps=run.config.num_steps)
    run.view.note(
        "ended before the step at hand was done; --resume goes on from the last checkpoint, if there is one"
    )
