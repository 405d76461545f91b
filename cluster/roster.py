"""Who is there of the generators, by place.

    a new place --come--> present --lost: died, silent, crashed, weights rejected--> absent --come--> present
    any         --close--> closed: nobody comes there any more

A place is a number that is given once. Losses and arrivals wake whoever waits for them.
"""

from __future__ import annotations

import asyncio
import time

from cluster.placement import START_TIMEOUT_S, Member, RoleFailed

NOBODY = Member("nobody", None)


class Roster:
    def __init__(self, members: list[Member]) -> None:
        self.members = members  # by place: who is there, or comes, or was last
        self._present = [True] * len(members)
        self._closed: set[int] = set()
        self._losses: dict[int, RoleFailed] = {}
        self._came_or_went = asyncio.Event()

    def places(self) -> list[int]:
        """Those that are not closed, whether somebody is there or not."""
        return [place for place in range(len(self.members)) if place not in self._closed]

    def present(self) -> list[int]:
        return [place for place, there in enumerate(self._present) if there]

    def is_present(self, place: int) -> bool:
        return self._present[place]

    def is_closed(self, place: int) -> bool:
        return place in self._closed

    def loss(self, place: int) -> RoleFailed:
        """Why nobody is there."""
        return self._losses[place]

    async def lost(self, place: int) -> RoleFailed:
        """Waits until nobody is there any more; why."""
        while self._present[place]:
            await self._changed()
        return self._losses[place]

    async def anyone(self) -> int:
        """A place where somebody is, once there is one. RoleFailed if nobody comes back in time."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (places := self.present()):
            if (left := deadline - time.monotonic()) <= 0:
                raise RoleFailed(f"generators: none came back within {START_TIMEOUT_S:g} s")
            try:
                await asyncio.wait_for(self._changed(), left)
            except TimeoutError:
                continue
        return places[0]

    def lose(self, place: int, member: Member, error: RoleFailed) -> None:
        """From now on it counts as gone. Of several failures the first counts."""
        if self._present[place] and self.members[place] is member:
            self._present[place] = False
            self._came_or_went.set()
            self.failed(place, error)

    def failed(self, place: int, error: RoleFailed) -> None:
        """Whoever was coming did not get so far."""
        self._losses[place] = error

    def come(self, place: int) -> None:
        self._present[place] = True
        self._came_or_went.set()

    def add(self) -> int:
        """A new place, for one that is still to come."""
        self.members.append(NOBODY)
        self._present.append(False)
        return len(self.members) - 1

    def close(self, place: int) -> None:
        """Whoever is there leaves, and the place with him."""
        self._closed.add(place)
        self.lose(place, self.members[place], RoleFailed("asked to leave"))

    async def _changed(self) -> None:
        self._came_or_went.clear()
        await self._came_or_went.wait()  # unbounded: its callers race it against what they wait for
