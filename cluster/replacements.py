"""Generators that are started while a run goes on: in place of one that was lost, or one more; and dismissed.

start --> load, agree on the layout, receive and prove the newest version --> present (roster.py)
"""

from __future__ import annotations

import asyncio
import time

from cluster.generator_group import GeneratorGroup, Replacement
from cluster.placement import Host, Member, RoleFailed


class Replacements:
    def __init__(self, group: GeneratorGroup, host: Host, how: Replacement) -> None:
        self._group = group
        self._roster = group.roster
        self._host = host
        self._how = how
        self._num_restarts = 0

    async def replace(self, slot: int) -> None:
        """End what is left of the generator that was lost, and start another in its slot, unless the slot
        is closed meanwhile. RoleFailed if `max_restarts` is reached."""
        started, old = time.perf_counter(), self._roster.members[slot].name
        while not self._roster.is_closed(slot):
            error = self._roster.failure(slot)
            await self._end(self._roster.members[slot], error)
            if self._num_restarts == self._how.max_restarts:
                raise RoleFailed(
                    f"{error}; {self._num_restarts} were replaced already, and generators.max_restarts "
                    "allows no more"
                ) from error
            self._num_restarts += 1
            if await self._comes_up(slot, self._num_restarts):
                self._how.on_event(
                    "generator_replaced",
                    generator=self._roster.members[slot].name,
                    instead_of=old,
                    seconds=round(time.perf_counter() - started, 3),
                )
                return

    async def add(self) -> int:
        """Start one more; its slot, once it has proved the newest weights. RoleFailed if it fails: then
        all is as before."""
        slot = self._roster.add()
        try:
            if await self._comes_up(slot, 0):
                return slot
            self._host.kill(self._roster.members[slot])
            raise self._roster.failure(slot)
        except BaseException:
            self._roster.close(slot)
            raise

    async def dismiss(self, slot: int) -> None:
        """Close the slot and end its generator, within 10 s."""
        async with self._group.weights:
            self._roster.close(slot)
        await self._host.stop([self._roster.members[slot]])

    async def _end(self, member: Member, error: RoleFailed) -> None:
        stack = await self._host.stack(member) if error.kind == "silent" else ""
        self._how.on_event("generator_lost", generator=member.name, reason=str(error), stack=stack)
        self._host.kill(member)

    async def _comes_up(self, slot: int, attempt: int) -> bool:
        """Start one there. False if it fails in a way that another start may mend, or if the slot was
        closed meanwhile."""
        member = self._roster.members[slot] = await self._start(slot, attempt)
        try:
            await self._group.bring_up(member)
        except BaseException as error:
            if isinstance(error, RoleFailed) and self._group.is_replaceable(error):
                self._roster.set_failure(slot, error)
                return False
            self._host.kill(member)
            raise
        if self._roster.is_closed(slot):
            self._host.kill(member)
            return False
        self._roster.mark_present(slot)
        return True

    async def _start(self, slot: int, attempt: int) -> Member:
        """In a thread, because it may wait for a GPU, and the others go on meanwhile."""
        starting = asyncio.ensure_future(asyncio.to_thread(self._how.start, slot, attempt))
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            starting.add_done_callback(self._kill_started)
            raise

    def _kill_started(self, starting: asyncio.Future[Member]) -> None:
        if not starting.cancelled() and starting.exception() is None:
            self._host.kill(starting.result())
