"""Watches the reward service: says when its process died and was restarted, and ends one that is stuck.

Generators call the service themselves, each call with its own deadline, and call again while it is
restarted. This is the driver's eye on it: a service that is stopped would otherwise be seen only as
scores that come too late.
"""

from __future__ import annotations

import asyncio
import time

from cluster.placement import RoleFailed, ask
from cluster.run import Run

EVERY_S = 1.0
AGAIN_S = 0.2


async def watch_rewards(run: Run) -> None:
    """Never ends but by RoleFailed: the service is gone for good."""
    pid = await _pid(run, within=run.config.reward.start_timeout_s)
    while True:
        await asyncio.sleep(EVERY_S)
        started = time.perf_counter()
        try:
            now = await _pid(run, within=run.config.ping_timeout_s)
            if now != pid:  # restarted before we asked
                _say_lost(run, f"{run.rewards.name}: its process died", "")
        except RoleFailed as failed:
            now = await _back(run, failed)
        if now != pid:
            pid = now
            run.host.locate(run.rewards)
            run.files.event(
                "reward_restarted", pid=pid, seconds=round(time.perf_counter() - started, 3)
            )


async def _pid(run: Run, within: float) -> int:
    pid: int = await ask(run.rewards, run.rewards.handle.pid, within=within)
    return pid


def _say_lost(run: Run, reason: str, stack: str) -> None:
    run.files.event("reward_lost", reason=reason, stack=stack)
    run.view.note(f"WARNING: {reason}; it is restarted" + (f"\n{stack}" if stack else ""))


async def _back(run: Run, failed: RoleFailed) -> int:
    """Wait until its new process answers, within the time that it may take to start."""
    if failed.kind == "raised":
        raise failed
    stack = await run.host.stack(run.rewards) if failed.kind == "silent" else ""
    _say_lost(run, str(failed), stack)
    if failed.kind == "silent":
        run.host.kill(run.rewards, restart=True)
    deadline = time.monotonic() + run.config.reward.start_timeout_s
    while True:
        await asyncio.sleep(AGAIN_S)
        try:
            return await _pid(run, within=max(1.0, deadline - time.monotonic()))
        except RoleFailed as again:
            if not again.comes_back or time.monotonic() > deadline:
                raise
