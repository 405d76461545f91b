"""Measures what the roles do: the loop says what it did, generators and reward service are asked."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from cluster.placement import Member, RoleFailed, ask
from cluster.role_times import Times, role_times, since
from cluster.supervisor import Supervisor


@dataclass(frozen=True)
class Counters:
    """What the roles count from their start, at one moment."""

    at: float  # perf_counter
    spent: dict[str, float]
    generators: dict[str, dict[str, Any]]  # by name
    reward: dict[str, float]

    def generators_since(self, before: Counters) -> list[dict[str, float]]:
        return [
            since(counters, before.generators.get(name, {}))
            for name, counters in self.generators.items()
        ]


@dataclass(frozen=True)
class Interval:
    """From one question to the next."""

    busy_share: float  # of its seconds, in which generators decoded
    generators: dict[str, dict[str, Any]]  # their status at its end, by name


class RoleMeter:
    def __init__(self, supervisor: Supervisor, rewards: Member, *, ping_s: float) -> None:
        """`ping_s`: within which the reward service answers."""
        self.seconds: dict[str, float] = {}  # by activity, of the whole run, resumed or not
        self._supervisor, self._rewards, self._ping_s = supervisor, rewards, ping_s
        self._first: Counters | None = None
        self._last: Counters | None = None
        self._lap = 0.0  # perf_counter

    async def begin(self) -> None:
        """Call it before prompts go out; only the first call counts."""
        if self._first is None:
            self._first = self._last = await self._counters()
            self._lap = self._first.at

    def spent(self, activity: str, seconds: float) -> float:
        self.seconds[activity] = self.seconds.get(activity, 0.0) + seconds
        return seconds

    def lap(self) -> float:
        """Seconds since this was last asked, or since `begin`: of whole steps, the first one, too."""
        before, self._lap = self._lap, time.perf_counter()
        return self._lap - before

    async def times(self) -> Times:
        """What each role did since `begin`; {} before it."""
        if (before := self._first) is None:
            return {}
        now = await self._counters()
        return role_times(
            now.at - before.at,
            since(now.spent, before.spent),
            now.generators_since(before),
            {"busy_s": max(0.0, since(now.reward, before.reward).get("reward/busy_s", 0.0))},
        )

    async def interval(self) -> Interval:
        """Since this was last asked, or since `begin`."""
        now, before = await self._counters(), self._last
        assert before is not None, "begin comes first"
        self._last, seconds = now, now.at - before.at
        busy = [one["busy_s"] for one in now.generators_since(before)]
        decoding = sum(busy) / max(1, len(busy))
        return Interval(decoding / seconds, now.generators)

    async def _counters(self) -> Counters:
        statuses = await self._supervisor.statuses()
        try:
            reward = await ask(self._rewards, self._rewards.handle.stats, within=self._ping_s)
        except RoleFailed:  # reward_watch.py sees to that; these are only figures
            reward = self._last.reward if self._last is not None else {}
        return Counters(time.perf_counter(), dict(self.seconds), statuses, reward)
