"""Which prompts are out, and with which generator: dealt evenly, given back, or waiting for anyone."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence

from actors.trajectory import Key, Prompt


class Assignments:
    def __init__(self) -> None:
        self._holder: dict[Key, int] = {}
        self._load: Counter[int] = Counter()  # prompts out, by place
        self._homeless: list[Prompt] = []  # nobody was there to take them

    def deal(self, prompts: Sequence[Prompt], places: Iterable[int]) -> dict[int, list[Prompt]]:
        """What each place is to be given. The least busy one, the first of equals: the same deal in every
        synchronous run. Without any place they wait here."""
        by_load = [(self._load[place], place) for place in places]
        if not by_load:
            self._homeless += prompts
            return {}
        shares: dict[int, list[Prompt]] = {}
        heapq.heapify(by_load)
        for prompt in prompts:
            load, place = by_load[0]
            heapq.heapreplace(by_load, (load + 1, place))
            shares.setdefault(place, []).append(prompt)
            self._load[place] = load + 1
            self._holder[prompt.key] = place
        return dict(sorted(shares.items()))

    def load(self, place: int) -> int:
        return self._load[place]

    def release(self, key: Key) -> None:
        self._load[self._holder.pop(key)] -= 1

    def held_by(self, place: int) -> list[Key]:
        return [key for key, holder in self._holder.items() if holder == place]

    def known(self) -> set[Key]:
        """Of all that are out, or wait for anyone."""
        return {*self._holder, *(prompt.key for prompt in self._homeless)}

    def homeless(self) -> list[Prompt]:
        """Those that waited; they do so no longer."""
        homeless, self._homeless = self._homeless, []
        return homeless

    def clear(self) -> None:
        self._holder.clear()
        self._load.clear()
        self._homeless.clear()
