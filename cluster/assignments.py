"""Which prompts are out, and in which generator's slot: dealt evenly, taken back, or not assigned yet."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence

from actors.trajectory import Key, Prompt


class Assignments:
    def __init__(self) -> None:
        self._holder: dict[Key, int] = {}
        self._load: Counter[int] = Counter()  # prompts out, by slot
        # Leased while no generator was present.
        self._unassigned: list[Prompt] = []

    def deal(self, prompts: Sequence[Prompt], slots: Iterable[int]) -> dict[int, list[Prompt]]:
        """Which prompts each slot is given: always the least loaded slot, the first of equals, so that
        synchronous runs repeat. Without any slot the prompts stay unassigned."""
        by_load = [(self._load[slot], slot) for slot in slots]
        if not by_load:
            self._unassigned += prompts
            return {}
        shares: dict[int, list[Prompt]] = {}
        heapq.heapify(by_load)
        for prompt in prompts:
            load, slot = by_load[0]
            heapq.heapreplace(by_load, (load + 1, slot))
            shares.setdefault(slot, []).append(prompt)
            self._load[slot] = load + 1
            self._holder[prompt.key] = slot
        return dict(sorted(shares.items()))

    def load(self, slot: int) -> int:
        return self._load[slot]

    def release(self, key: Key) -> None:
        self._load[self._holder.pop(key)] -= 1

    def held_by(self, slot: int) -> list[Key]:
        return [key for key, holder in self._holder.items() if holder == slot]

    def known(self) -> set[Key]:
        """Keys of all prompts that are out or unassigned."""
        return {*self._holder, *(prompt.key for prompt in self._unassigned)}

    def take_unassigned(self) -> list[Prompt]:
        """The unassigned prompts, which the caller deals now."""
        unassigned, self._unassigned = self._unassigned, []
        return unassigned

    def clear(self) -> None:
        self._holder.clear()
        self._load.clear()
        self._unassigned.clear()
