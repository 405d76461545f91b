"""One long poll a generator: takes what it has finished, and notices when it finishes nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from actors.rollout_worker import Rollouts
from cluster.generator_group import GeneratorGroup, Lost
from cluster.placement import Host, Member, ask_beside

POLL_S = 1.0
# Seconds for which a generator gathers before it answers. An answer costs it milliseconds that its
# engine needs; and the driver takes about a thousand a second, however many generators there are.
LINGER_S = 0.2
LINGER_PER_GENERATOR_S = 1e-3


class Poller:
    def __init__(
        self,
        group: GeneratorGroup,
        host: Host,
        *,
        receive: Callable[[Rollouts, Any], Awaitable[None]],
        load: Callable[[int], int],
        lingers: bool,
        timeout_s: float,
        ping_s: float,
    ) -> None:
        """`receive`: takes (what finished, the chunk of its trajectories); `load`: prompts out in a slot;
        `lingers`: not in a synchronous run, where each generator answers once a step, and the step waits
        for it; `timeout_s`: for one completion; `ping_s`: for any answer."""
        self._group = group
        self._roster = group.roster
        self._host = host
        self._receive = receive
        self._load = load
        self._lingers = lingers
        self._timeout_s = timeout_s
        self._ping_s = ping_s

    async def until_lost(self, slot: int) -> None:
        """Poll the generator in `slot` until it is lost. RoleFailed if a new one cannot replace it."""
        poll = asyncio.create_task(self._poll(slot))
        lost = asyncio.create_task(self._roster.wait_lost(slot))
        try:
            await asyncio.wait([poll, lost], return_when=asyncio.FIRST_COMPLETED)
            if poll.done() and not isinstance(poll.exception(), Lost):
                poll.result()  # raises
        finally:
            poll.cancel()
            lost.cancel()

    async def _poll(self, slot: int) -> None:
        member = self._roster.members[slot]
        last_heard, tokens = time.monotonic(), 0
        while True:
            rollouts, chunk = await self._group.or_lost(slot, member, self._take(member))
            if rollouts:
                last_heard = time.monotonic()
                await self._receive(rollouts, chunk)
                continue
            # Its engine's thread, not only its event loop, has to answer. It may have finished completions
            # that are handed over with others, or wait for scores, which have a deadline of their own.
            status = await self._group.ask(slot, lambda it: it.status, within=self._timeout_s)
            before, tokens = tokens, status["completion_tokens"]
            if not self._load(slot) or tokens != before or status["scoring"]:
                last_heard = time.monotonic()
            elif time.monotonic() - last_heard > self._timeout_s:
                raise self._group.silent(slot, member)

    async def _take(self, member: Member) -> tuple[Rollouts, Any]:
        """What it has finished. Until this returns, nothing counts as finished: what is lost on the way
        is still out, and goes to another generator like the rest."""
        rollouts, chunk = await ask_beside(
            member, member.handle.take, POLL_S, self._linger_s(), within=POLL_S + self._ping_s
        )
        if rollouts.finished:
            chunk = await self._host.keep(member, chunk, within=self._ping_s)
        return rollouts, chunk

    def _linger_s(self) -> float:
        if not self._lingers:
            return 0.0
        return max(LINGER_S, LINGER_PER_GENERATOR_S * len(self._roster.present()))
