"""Processes of this machine, seen from outside: their stacks, and their end."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path

STACK_TIMEOUT_S = 10.0


def kill_worker(pid: int) -> None:
    """kill -9 of a Ray worker; of nothing else, as the number may be another's by now."""
    import psutil

    with contextlib.suppress(psutil.Error, IndexError):
        process = psutil.Process(pid)
        if process.cmdline()[0].startswith("ray::"):
            process.kill()


async def stack_of(pid: int) -> str:
    """The Python stacks of a process on this machine, stopped ones too, by py-spy (it comes with Ray's
    dashboard); without it, or without the right to look, the process's state alone."""
    import psutil

    try:
        state = f"process {pid} is {psutil.Process(pid).status()}"
        spy = await asyncio.create_subprocess_exec(
            str(Path(sys.executable).with_name("py-spy")),
            *("dump", "--nonblocking", "--pid", str(pid)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        said, _ = await asyncio.wait_for(spy.communicate(), STACK_TIMEOUT_S)
    except (OSError, psutil.Error, TimeoutError) as error:
        return f"process {pid}: {type(error).__name__}"
    return "\n".join([state, said.decode(errors="replace").strip()])
