"""The ledger: every prompt that is out, in exactly one state, and how many more may go out.

    stream -> leased (to the generators) -> finished (scored, in the buffer) -> consumed in a step
                                        \\-> dropped, with a reason     \\-> refused: dropped, too

Admission bounds staleness. With n prompts a step, prompts leased while the learner's version is v are
numbered below (v + 1 + max_staleness) n, not counting drops; steps consume the oldest first; so a
prompt leased at v is consumed at version v + max_staleness at the latest, provided that a step waits
where those it would leave behind could not all be consumed in time (`ready`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from actors.trajectory import Key, Prompt


@dataclass
class Lease:
    """A prompt that is out. `version`: the learner's when it was leased; its tokens are as new."""

    prompt: Prompt
    number: int
    version: int
    finished: bool = False


class Ledger:
    def __init__(
        self, *, prompts_per_step: int, max_staleness: int, in_order: bool = False
    ) -> None:
        """`in_order`: a step takes the oldest prompts, and waits for those of them that are not done."""
        self._per_step = prompts_per_step
        self._in_order = in_order
        self.max_staleness = max_staleness
        self._leases: dict[Key, Lease] = {}
        self._next_number = 0
        self._num_finished = 0
        self._in_step: list[Key] = []  # what was consumed last
        self._num_dropped_before = 0  # by the end of the last step
        self.num_leased = 0  # ever, drops not counted
        self.num_consumed = 0
        self.num_dropped = 0

    def capacity(self, version: int) -> int:
        """How many prompts may be leased now."""
        return (version + 1 + self.max_staleness) * self._per_step - self.num_leased

    def lease(self, prompt: Prompt, version: int) -> None:
        key = prompt.key
        assert key not in self._leases, f"{key} is out already"
        self._leases[key] = Lease(prompt, self._next_number, version)
        self._next_number += 1
        self.num_leased += 1

    def finish(self, key: Key) -> None:
        lease = self._leases[key]
        assert not lease.finished, f"{key} finished twice"
        lease.finished = True
        self._num_finished += 1

    def drop(self, key: Key) -> None:
        """Given up: its place may be taken by another prompt."""
        assert not self._leases.pop(key).finished, f"{key} was finished, and cannot be dropped"
        self.num_leased -= 1
        self.num_dropped += 1

    def ready(self, version: int) -> list[Key] | None:
        """The prompts of the next step, oldest first; None while a step has to wait."""
        if self._num_finished < self._per_step:
            return None
        by_age = list(self._leases.items())  # leases are added, and restored, in their order
        if self._in_order and not all(lease.finished for _, lease in by_age[: self._per_step]):
            return None
        keys = [key for key, lease in by_age if lease.finished][: self._per_step]
        taken = set(keys)
        left = [lease for key, lease in by_age if key not in taken]
        for place, lease in enumerate(left):
            consumed_at = version + 1 + place // self._per_step  # if steps take the oldest first
            if consumed_at - lease.version > self.max_staleness:
                assert self.outstanding(), (
                    "prompts can only be consumed too stale; nothing is awaited"
                )
                return None
        return keys

    def consume(self, keys: Iterable[Key]) -> None:
        self._in_step = [*keys]
        for key in self._in_step:
            assert self._leases.pop(key).finished, f"{key} was not finished"
            self._num_finished -= 1
            self.num_consumed += 1
        self._num_dropped_before = self.num_dropped

    def refuse(self, keys: Iterable[Key]) -> None:
        """The step that consumed these was refused: they count as dropped, and the version stays, so
        that as many others may take their places."""
        refused = [*keys]
        assert [] != refused == self._in_step, "only the step at hand can be refused"
        self._in_step = []
        self.num_leased -= len(refused)
        self.num_consumed -= len(refused)
        self.num_dropped += len(refused)
        self._num_dropped_before = self.num_dropped

    def __len__(self) -> int:
        """Prompts that are out: leased or finished, not consumed."""
        return len(self._leases)

    def outstanding(self) -> list[Prompt]:
        """Leased, not finished; in the order of the leases."""
        return [lease.prompt for lease in self._leases.values() if not lease.finished]

    def clear(self) -> None:
        """As if nothing had ever been leased."""
        self._leases.clear()
        self._next_number = self._num_finished = 0
        self.num_leased = self.num_consumed = self.num_dropped = self._num_dropped_before = 0

    def num_awaited(self, version: int) -> int:
        """Prompts that were leased at an older version and are not finished."""
        leases = self._leases.values()
        return sum(not lease.finished and lease.version < version for lease in leases)

    def state(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return {
            "num_leased": self.num_leased,
            "num_consumed": self.num_consumed,
            "num_dropped": self.num_dropped,
            "leases": [asdict(lease) for lease in self._leases.values()],
        }

    def without_leases(self) -> dict[str, Any]:
        """The state as it was before anything was leased that is not consumed."""
        before = {"num_leased": self.num_consumed, "num_dropped": self._num_dropped_before}
        return {**self.state(), **before, "leases": []}

    def restore(self, state: dict[str, Any]) -> None:
        self.num_leased = state["num_leased"]
        self.num_consumed = state["num_consumed"]
        self.num_dropped = self._num_dropped_before = state["num_dropped"]
        for saved in sorted(state["leases"], key=lambda lease: lease["number"]):
            prompt = Prompt(**{**saved["prompt"], "ids": tuple(saved["prompt"]["ids"])})
            self._leases[prompt.key] = Lease(**{**saved, "prompt": prompt})
            self._num_finished += saved["finished"]
            self._next_number = saved["number"] + 1
