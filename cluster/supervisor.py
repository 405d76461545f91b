"""Keeps the generators busy and the buffer filled, and watches for those that fail.

    admit (stream -> ledger -> generators)   as many prompts as the staleness bound allows
    collect (generators -> ledger, buffer)   one task a generator, a long poll each
    take (buffer -> the loop)                waits until the ledger says that a step is ready

`take` waits for `collect`, is unblocked by it, and fails with it: a generator that died, hangs or
raised ends the wait at once with a RoleFailed that names it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa

from actors.prompts import PromptStream
from actors.rollout_worker import Dropped, Rollouts
from actors.trajectory import Prompt
from actors.weight_update import WeightLayout, WeightUpdate
from cluster.ledger import Ledger
from cluster.placement import Host, Member, RoleFailed, ask
from learner.trajectory_buffer import TrajectoryBuffer

POLL_S = 1.0
PING_TIMEOUT_S = 30.0


class Supervisor:
    def __init__(
        self,
        generators: list[Member],
        host: Host,
        stream: PromptStream,
        ledger: Ledger,
        *,
        rollout_timeout_s: float,
        on_drop: Callable[[Dropped], None],
    ) -> None:
        self.generators = generators
        self.stream = stream
        self.ledger = ledger
        self.buffer = TrajectoryBuffer()
        self._host = host
        self._timeout_s = rollout_timeout_s
        self._on_drop = on_drop
        self._load = [0] * len(generators)  # prompts out, by generator
        self._holder: dict[tuple[str, int], int] = {}
        self._changed = asyncio.Event()
        self._collectors: list[asyncio.Task[None]] = []
        self._version = 0

    # ---- the flow of prompts

    async def admit(self, version: int) -> None:
        """Lease prompts up to the staleness bound and hand them to the generators."""
        self._version = version
        prompts = [next(self.stream) for _ in range(max(0, self.ledger.capacity(version)))]
        for prompt in prompts:
            self.ledger.lease(prompt, version)
        await self._submit(prompts)

    async def resubmit(self) -> None:
        """After a resume: what was out when the checkpoint was made goes out again."""
        await self._submit(self.ledger.outstanding())

    async def take(self, version: int, stop: asyncio.Event) -> pa.Table | None:
        """The next step's trajectories; None if `stop` was set first."""
        while (keys := self.ledger.ready(version)) is None:
            if stop.is_set():
                return None
            self._changed.clear()
            await self._wait(stop)
        self.ledger.consume(keys)
        return self.buffer.take(keys)

    async def _wait(self, stop: asyncio.Event) -> None:
        """Until something changed, a collector failed, or a stop is asked for."""
        self._collect()
        waits = [asyncio.ensure_future(self._changed.wait()), asyncio.ensure_future(stop.wait())]
        await asyncio.wait([*waits, *self._collectors], return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        for collector in self._collectors:
            if collector.done():
                collector.result()  # raises what it failed of

    async def _submit(self, prompts: list[Prompt]) -> None:
        shares: list[list[Prompt]] = [[] for _ in self.generators]
        for prompt in prompts:
            # The least busy one, the first of equals: the same deal in every synchronous run.
            place = min(range(len(shares)), key=lambda i: (self._load[i], i))
            shares[place].append(prompt)
            self._load[place] += 1
            self._holder[prompt.prompt_id, prompt.epoch] = place
        calls = [
            ask(member, member.handle.submit, share, within=PING_TIMEOUT_S)
            for member, share in zip(self.generators, shares, strict=True)
            if share
        ]
        await asyncio.gather(*calls)

    def _collect(self) -> None:
        if not self._collectors:
            self._collectors = [
                asyncio.create_task(self._collect_from(place))
                for place in range(len(self.generators))
            ]

    async def _collect_from(self, place: int) -> None:
        try:
            await self._poll(place)
        except RoleFailed as error:
            raise RoleFailed(f"{error} ({self._out_there(place)})") from error

    async def _poll(self, place: int) -> None:
        member = self.generators[place]
        last_heard = time.monotonic()
        while True:
            rollouts: Rollouts = await ask(
                member, member.handle.take, POLL_S, within=POLL_S + PING_TIMEOUT_S
            )
            if rollouts.trajectories or rollouts.dropped:
                last_heard = time.monotonic()
                await self._receive(place, rollouts)
            elif not self._load[place]:
                last_heard = time.monotonic()
            elif time.monotonic() - last_heard > self._timeout_s:
                raise RoleFailed(f"{member.name}: no completion for {self._timeout_s:g} s")
            else:
                await ask(member, member.handle.status, within=self._timeout_s)

    async def _receive(self, place: int, rollouts: Rollouts) -> None:
        for key in self.buffer.add(rollouts.trajectories):
            self.ledger.finish(key)
            self._release(key)
        for dropped in rollouts.dropped:
            key = (dropped.prompt_id, dropped.epoch)
            self.ledger.drop(key)
            self._release(key)
            self._on_drop(dropped)
        if rollouts.dropped:
            await self.admit(self._version)  # others take their places
        self._changed.set()

    def _release(self, key: tuple[str, int]) -> None:
        self._load[self._holder.pop(key)] -= 1

    def _out_there(self, place: int) -> str:
        out = [prompt_id for (prompt_id, _), holder in self._holder.items() if holder == place]
        return f"{len(out)} prompts were out there, {', '.join(sorted(out)[:5])} among them"

    # ---- weights and state of the generators

    async def agree_layout(self, layout: WeightLayout) -> None:
        agreed = await self._each(lambda it: it.agree_layout, layout, within=PING_TIMEOUT_S)
        assert set(agreed) == {layout.id}

    async def receive_weights(self, update: WeightUpdate) -> list[dict[str, float]]:
        """Returns when every generator has proved the new version."""
        shared = self._host.share(update) if update.payload else update
        return await self._each(lambda it: it.receive_weights, shared, within=self._timeout_s)

    async def statuses(self, within: float = PING_TIMEOUT_S) -> list[dict[str, Any]]:
        return await self._each(lambda it: it.status, within=within)

    async def sample(self, prompts: list[Prompt], temperature: float, seed: int) -> list[Any]:
        """One completion a prompt, spread over all generators; in the order of the prompts."""
        count = len(self.generators)
        shares = [prompts[place::count] for place in range(count)]
        answers = await asyncio.gather(
            *(
                ask(m, m.handle.sample, share, temperature, seed, within=self._timeout_s)
                for m, share in zip(self.generators, shares, strict=True)
            )
        )
        return [answers[i % count][i // count] for i in range(len(prompts))]

    async def close(self) -> None:
        for collector in self._collectors:
            collector.cancel()
        await asyncio.gather(*self._collectors, return_exceptions=True)

    async def _each(self, method: Callable[[Any], Any], *args: Any, within: float) -> list[Any]:
        calls: Iterable[Any] = (
            ask(member, method(member.handle), *args, within=within) for member in self.generators
        )
        return await asyncio.gather(*calls)
