"""Tasks that run beside the loop: whoever waits for the run to go on fails with the first that failed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any


class Watched:
    def __init__(self) -> None:
        self._changed = asyncio.Event()
        self._failed: list[asyncio.Task[Any]] = []

    def watch(self, task: asyncio.Task[Any]) -> None:
        """If it fails, `wait` fails with it."""
        task.add_done_callback(self._ended)

    def notify(self) -> None:
        """Wake whoever waits: what it waits for may have come."""
        self._changed.set()

    async def wait(self, stop: asyncio.Event | None = None) -> None:
        """Until the next `notify`, until a watched task has failed (raises what it failed with), or until
        `stop` is set. It is called for every answer of every generator, and so looks at none of the tasks."""
        self._changed.clear()
        waits = [asyncio.ensure_future(self._changed.wait())]
        if stop is not None:
            waits.append(asyncio.ensure_future(stop.wait()))
        if not self._failed:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        for task in self._failed:
            task.result()

    def forget(self, which: Callable[[asyncio.Task[Any]], bool]) -> None:
        """Forget the failures of those tasks."""
        self._failed = [task for task in self._failed if not which(task)]

    def _ended(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._failed.append(task)
            self._changed.set()
