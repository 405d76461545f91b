"""Which generators are present, by slot.

    new    --mark_present--> present --mark_lost (died, silent, rejected weights)--> absent
    absent --mark_present--> present
    any    --close--> closed: no generator starts there any more

A slot is a number that is given once. Losses and arrivals wake whoever waits for them.
"""

from __future__ import annotations

import asyncio
import time

from cluster.placement import START_TIMEOUT_S, Member, RoleFailed

NOBODY = Member("nobody", None)


class Roster:
    def __init__(self, members: list[Member]) -> None:
        # By slot: the generator that is present there, or starts, or was the last one.
        self.members = members
        self._present = [True] * len(members)
        self._closed: set[int] = set()
        self._failures: dict[int, RoleFailed] = {}
        self._came_or_went = asyncio.Event()

    def slots(self) -> list[int]:
        """Those that are not closed, with a generator or without."""
        return [slot for slot in range(len(self.members)) if slot not in self._closed]

    def present(self) -> list[int]:
        return [slot for slot, present in enumerate(self._present) if present]

    def is_present(self, slot: int) -> bool:
        return self._present[slot]

    def is_closed(self, slot: int) -> bool:
        return slot in self._closed

    def failure(self, slot: int) -> RoleFailed:
        """Why no generator is present in this slot."""
        return self._failures[slot]

    async def wait_lost(self, slot: int) -> RoleFailed:
        """Wait until the generator in this slot is lost; returns why."""
        while self._present[slot]:
            await self._changed()
        return self._failures[slot]

    async def wait_any(self) -> int:
        """Wait until a generator is present; returns its slot. RoleFailed if none is in time."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (slots := self.present()):
            if (left := deadline - time.monotonic()) <= 0:
                raise RoleFailed(f"generators: none came back within {START_TIMEOUT_S:g} s")
            try:
                await asyncio.wait_for(self._changed(), left)
            except TimeoutError:
                continue
        return slots[0]

    def mark_lost(self, slot: int, member: Member, error: RoleFailed) -> None:
        """Of several failures of one generator the first counts."""
        if self._present[slot] and self.members[slot] is member:
            self._present[slot] = False
            self._came_or_went.set()
            self.set_failure(slot, error)

    def set_failure(self, slot: int, error: RoleFailed) -> None:
        """Record why the generator that was starting in this slot failed."""
        self._failures[slot] = error

    def mark_present(self, slot: int) -> None:
        self._present[slot] = True
        self._came_or_went.set()

    def add(self) -> int:
        """A new slot, for a generator that is still to start."""
        self.members.append(NOBODY)
        self._present.append(False)
        return len(self.members) - 1

    def close(self, slot: int) -> None:
        """Remove the slot for good, and with it the generator there."""
        self._closed.add(slot)
        self.mark_lost(slot, self.members[slot], RoleFailed("asked to leave"))

    async def _changed(self) -> None:
        self._came_or_went.clear()
        # Unbounded: its callers race it against what they wait for.
        await self._came_or_went.wait()
