"""The ledger: every prompt that is out, in exactly one state, and how many more may go out.

    stream -> leased (to the generators) -> finished (scored, in the buffer) -> consumed in a step
                                        \\-> dropped, with a reason     \\-> refused: dropped, too

Admission bounds staleness. With n prompts a step, prompts leased while the learner's version is v are
numbered below (v + 1 + max_staleness) n, not counting drops; steps consume the oldest first; so a
prompt leased at v is consumed at version v + max_staleness at the latest, provided that a step waits
where those it would leave behind could not all be consumed in time (`ready`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from actors.trajectory import Key, Prompt


@dataclass
class Lease:
    """A prompt that is out. `version`: the proved one when it was leased; its tokens are as new or newer."""

    prompt: Prompt
    number: int
    version: int
    finished: bool = False


class Ledger:
    def __init__(
        self, *, prompts_per_step: int, max_staleness: int, in_order: bool = False
    ) -> None:
        """`in_order`: a step takes the oldest prompts, and waits for those of them that are not done."""
        self.prompts_per_step = prompts_per_step
        self._in_order = in_order
        self.max_staleness = max_staleness
        self._leases: dict[Key, Lease] = {}
        self._next_number = 0
        self._num_finished = 0
        self._num_out: Counter[int] = Counter()  # by the version they were leased at
        self._num_done: Counter[int] = Counter()  # of these, finished
        self._in_step: list[Key] = []  # what was consumed last
        self._num_dropped_before = 0  # by the end of the last step
        self.num_leased = 0  # ever, drops not counted
        self.num_consumed = 0
        self.num_dropped = 0

    def capacity(self, version: int) -> int:
        """How many prompts may be leased now."""
        return (version + 1 + self.max_staleness) * self.prompts_per_step - self.num_leased

    def lease(self, prompt: Prompt, version: int) -> None:
        key = prompt.key
        assert key not in self._leases, f"{key} is out already"
        self._add(Lease(prompt, self._next_number, version))
        self.num_leased += 1

    def finish(self, key: Key) -> None:
        lease = self._leases[key]
        assert not lease.finished, f"{key} finished twice"
        lease.finished = True
        self._num_done[lease.version] += 1
        self._num_finished += 1

    def drop(self, key: Key) -> None:
        """Given up: its place may be taken by another prompt."""
        assert not self._remove(key).finished, f"{key} was finished, and cannot be dropped"
        self.num_leased -= 1
        self.num_dropped += 1

    def ready(self, version: int) -> list[Key] | None:
        """The prompts of the next step, oldest first; None while a step has to wait. Cheap to ask: it is
        whenever a prompt is finished."""
        if self._num_finished < self.prompts_per_step:
            return None
        leases = self._leases.items()  # added, and restored, in their order
        if self._in_order and not all(
            one.finished for _, one in islice(leases, self.prompts_per_step)
        ):
            return None
        if self._leaves_too_old(version):
            assert len(self) > self._num_finished, (
                "prompts can only be consumed too stale; nothing is awaited"
            )
            return None
        finished = (key for key, lease in leases if lease.finished)
        return [*islice(finished, self.prompts_per_step)]

    def _leaves_too_old(self, version: int) -> bool:
        """Whether a step now, of the oldest that are finished, would leave some behind that the steps
        after it, taking the oldest first, too, could not all consume in time.

        Those leased at v or before come first, L of them after this step; the last of them is consumed
        at version + 1 + (L - 1) // per_step, which must be v + max_staleness or less."""
        out = done = 0
        for leased_at in sorted(self._num_out):
            out += self._num_out[leased_at]
            done += self._num_done[leased_at]
            left = out - min(done, self.prompts_per_step)
            if left > (leased_at + self.max_staleness - version) * self.prompts_per_step:
                return True
        return False

    def consume(self, keys: Iterable[Key]) -> None:
        self._in_step = [*keys]
        for key in self._in_step:
            assert self._remove(key).finished, f"{key} was not finished"
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
        """Forget every lease, drop and finished prompt."""
        for counts in (self._leases, self._num_out, self._num_done):
            counts.clear()
        self._next_number = self._num_finished = 0
        self.num_leased = self.num_consumed = self.num_dropped = self._num_dropped_before = 0

    def num_awaited(self, version: int) -> int:
        """Prompts that were leased at an older version and are not finished."""
        return sum(
            number - self._num_done[leased_at]
            for leased_at, number in self._num_out.items()
            if leased_at < version
        )

    def state(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return {
            "num_leased": self.num_leased,
            "num_consumed": self.num_consumed,
            "num_dropped": self.num_dropped,
            "leases": [
                {**vars(lease), "prompt": _as_dict(lease.prompt)} for lease in self._leases.values()
            ],
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
            self._add(Lease(**{**saved, "prompt": prompt}))

    def _add(self, lease: Lease) -> None:
        self._leases[lease.prompt.key] = lease
        self._num_out[lease.version] += 1
        self._num_done[lease.version] += lease.finished
        self._num_finished += lease.finished
        self._next_number = lease.number + 1

    def _remove(self, key: Key) -> Lease:
        lease = self._leases.pop(key)
        self._num_finished -= lease.finished
        self._num_done[lease.version] -= lease.finished
        self._num_out[lease.version] -= 1
        if not self._num_out[lease.version]:
            del self._num_out[lease.version], self._num_done[lease.version]
        return lease


def _as_dict(prompt: Prompt) -> dict[str, Any]:
    """`asdict` would copy every token id."""
    return {name: getattr(prompt, name) for name in Prompt.__slots__}
