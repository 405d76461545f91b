"""Keeps the generators busy and the buffer filled, and watches for those that fail.

    admit (stream -> ledger -> generators)   as many prompts as the staleness bound allows
    collect (generators -> ledger, buffer)   one task a generator, a long poll each
    take (buffer -> the loop)                waits until the ledger says that a step is ready
    push (learner -> generators)             until each has proved the new weights
    scale                                    more generators, or fewer, beside all this

`take` waits for `collect` (polling.py), is unblocked by it, and fails with it or with a push (watched.py).
A generator that dies, hangs, breaks or is lost with its machine is replaced (replacements.py) and its
prompts go out again, to the others at once; where it may not be replaced the wait ends with a RoleFailed
that names it. What passes through here are names, counts and references; trajectories stay on the machine
they are on, or come to this one, until the learner reads them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

from actors.prompts import PromptStream
from actors.rollout_worker import Rollouts
from actors.scored import Dropped
from actors.trajectory import Prompt
from actors.weight_update import ProbeAnswer, WeightUpdate
from cluster.assignments import Assignments
from cluster.generator_group import GeneratorGroup, Lost, Replacement
from cluster.learner_group import LearnerLost
from cluster.ledger import Ledger
from cluster.placement import Host, Member, RoleFailed
from cluster.polling import Poller
from cluster.replacements import Replacements
from cluster.watched import Watched
from learner.trajectory_buffer import Batch, TrajectoryBuffer

PING_TIMEOUT_S = 30.0
# Prompts that may be dropped one after another, of two steps and never fewer than this: what fails them
# all is no prompt's fault.
LEAST_DROPS = 16


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
        ping_timeout_s: float = PING_TIMEOUT_S,
        replacement: Replacement | None = None,
    ) -> None:
        """`rollout_timeout_s`: for one completion; `ping_timeout_s`: for any answer at all."""
        self.group = GeneratorGroup(
            generators,
            host,
            timeout_s=rollout_timeout_s,
            ping_s=ping_timeout_s,
            replacement=replacement,
        )
        self._replacements = (
            Replacements(self.group, host, replacement) if replacement is not None else None
        )
        self._poller = Poller(
            self.group,
            host,
            receive=self._receive,
            load=lambda slot: self._out.load(slot),
            lingers=ledger.max_staleness > 0,
            timeout_s=rollout_timeout_s,
            ping_s=ping_timeout_s,
        )
        self.stream = stream
        self.ledger = ledger
        self.buffer = TrajectoryBuffer()
        self._roster = self.group.roster
        self._ping_s = ping_timeout_s
        self._on_drop = on_drop
        self._out = Assignments()
        self._watched = Watched()
        self._collectors: list[asyncio.Task[None]] = []
        self._joining: list[asyncio.Task[None]] = []
        self._push: asyncio.Task[dict[str, float]] | None = None
        self._drops_in_a_row = 0
        self.version = 0  # that every generator has proved

    # ---- the flow of prompts

    async def admit(self) -> None:
        """Lease prompts up to the staleness bound and hand them to the generators. What is leased
        now is sampled from the proved version or a newer one."""
        prompts = [next(self.stream) for _ in range(max(0, self.ledger.capacity(self.version)))]
        for prompt in prompts:
            self.ledger.lease(prompt, self.version)
        await self._submit(prompts)

    async def resubmit(self) -> None:
        """After a resume: what was out when the checkpoint was made goes out again. Not what was leased
        since: when a learner has been replaced, the push of its weights has handed that out."""
        out = self._out.known()
        await self._submit([p for p in self.ledger.outstanding() if p.key not in out])

    async def take(self, version: int, stop: asyncio.Event) -> Batch | None:
        """The trajectories of the learner's next step, it being at `version`; None if `stop` was set
        first."""
        while (keys := self.ledger.ready(version)) is None:
            if stop.is_set():
                return None
            await self._wait(stop)
        self.ledger.consume(keys)
        return self.buffer.take(keys)

    async def wait_settled(self) -> None:
        """Wait until all that was leased before the proved version is finished: sampled anew after a
        resume, it would come from newer weights. It is sampled already; at most its score is missing."""
        while self.ledger.num_awaited(self.version):
            await self._wait()

    def watch(self, task: asyncio.Task[Any]) -> None:
        """If it fails, `take` fails with it."""
        self._watched.watch(task)

    async def _wait(self, stop: asyncio.Event | None = None) -> None:
        """Until something changed, a collector or a push failed, or a stop is asked for."""
        self._collect()
        await self._watched.wait(stop)

    async def sample(self, prompts: list[Prompt], temperature: float, seed: int) -> list[Any]:
        """GeneratorGroup.sample, which fails with whatever is watched: no generator may ever come back."""
        sampling = asyncio.create_task(self.group.sample(prompts, temperature, seed))
        sampling.add_done_callback(lambda _: self._watched.notify())
        try:
            while not sampling.done():
                await self._wait()
            return await sampling
        finally:
            sampling.cancel()

    async def _submit(self, prompts: list[Prompt]) -> None:
        shares = self._out.deal(prompts, self._roster.present())
        await asyncio.gather(*(self._hand_over(*share) for share in shares.items()))

    async def _hand_over(self, slot: int, prompts: list[Prompt]) -> None:
        with contextlib.suppress(Lost):  # then its collector takes them back
            await self.group.ask(slot, lambda it: it.submit, prompts, within=self._ping_s)

    def _collect(self) -> None:
        if not self._collectors:
            for slot in self._roster.slots():
                self._collect_at(slot)

    def _collect_at(self, slot: int) -> None:
        collector = asyncio.create_task(self._collect_from(slot))
        self._collectors.append(collector)
        self.watch(collector)

    async def _collect_from(self, slot: int) -> None:
        """Poll the generator in this slot; when it is lost, its prompts go to others and it is replaced."""
        while not self._roster.is_closed(slot):
            if self._roster.is_present(slot):
                await self._until_lost(slot)
            await self._submit(self._take_back(slot))
            assert self._replacements is not None, "without replacements nothing is Lost"
            await self._replacements.replace(slot)
            await self._submit(self._out.take_unassigned())

    async def _until_lost(self, slot: int) -> None:
        try:
            await self._poller.until_lost(slot)
        except RoleFailed as error:
            out = sorted(prompt_id for prompt_id, _ in self._out.held_by(slot))
            raise RoleFailed(
                f"{error} ({len(out)} prompts were out there, {', '.join(out[:5])} among them)",
                kind=error.kind,
                cause=error.cause,
            ) from error

    def _take_back(self, slot: int) -> list[Prompt]:
        """The prompts that are out in this slot, in the order of their leases."""
        held = set(self._out.held_by(slot))
        prompts = [prompt for prompt in self.ledger.outstanding() if prompt.key in held]
        for prompt in prompts:
            self._out.release(prompt.key)
        return prompts

    async def _receive(self, rollouts: Rollouts, chunk: Any) -> None:
        self.buffer.add(rollouts.finished, chunk)
        for key in rollouts.finished:
            self.ledger.finish(key)
            self._out.release(key)
            self._drops_in_a_row = 0
        for dropped in rollouts.dropped:
            key = (dropped.prompt_id, dropped.epoch)
            self.ledger.drop(key)
            self._out.release(key)
            self._on_drop(dropped)
            self._drops_in_a_row += 1
        self._watched.notify()
        if self._drops_in_a_row >= max(LEAST_DROPS, 2 * self.ledger.prompts_per_step):
            raise RoleFailed(
                f"{self._drops_in_a_row} prompts in a row were dropped, the last one because: "
                f"{rollouts.dropped[-1].reason}"
            )
        if rollouts.dropped:  # others take their places, even if this poll is cancelled
            await asyncio.shield(self.admit())

    # ---- how many there are

    @property
    def collecting(self) -> bool:
        """Whether weights have been pushed since the start, or the last reset: generators may come and go."""
        return bool(self._collectors)

    def num_generators(self) -> int:
        """Those that are starting or being replaced are counted, too."""
        return len(self._roster.slots())

    async def scale(self, count: int) -> bool:
        """Become `count` generators; False if a reset came between. New ones are given prompts once they
        have proved the newest weights; the youngest leave at once, and what they had begun goes to the
        others. RoleFailed if a new one does not come up, once the others have."""
        assert self._replacements is not None, "a run in one process does not scale"
        await asyncio.gather(*map(self._replacements.dismiss, self._roster.slots()[count:]))
        missing = count - self.num_generators()
        self._joining = [asyncio.create_task(self._join()) for _ in range(missing)]
        for ended in await asyncio.gather(*self._joining, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended
        return self.num_generators() == count

    async def _join(self) -> None:
        assert self._replacements is not None
        self._collect_at(await self._replacements.add())
        await self._submit(self._out.take_unassigned())

    # ---- weights and state of the generators

    async def push(
        self, update: WeightUpdate, answering: asyncio.Future[ProbeAnswer]
    ) -> list[dict[str, float]]:
        """Returns each generator's proof, when all have proved the new version; from then on it
        counts as the version that prompts are leased at."""
        self._collect()  # from now on one that is lost is replaced
        proofs = await self.group.push(update, answering)
        self.version = update.version
        return list(proofs.values())

    def begin_push(self, push: Coroutine[Any, Any, dict[str, float]]) -> None:
        """Run a push beside everything else; `take` fails with it."""
        assert self._push is None, "two segments take turns: the last push must have ended"
        self._push = asyncio.create_task(push)
        self.watch(self._push)

    async def wait_push(self) -> dict[str, float]:
        """Wait for the push that was begun last; what it returned, or {} if that was told already."""
        push, self._push = self._push, None
        return await push if push is not None else {}

    async def statuses(self) -> dict[str, dict[str, Any]]:
        """Of each present generator, by name."""
        return await self.group.each(lambda it: it.status, within=self._ping_s)

    async def reset(self) -> None:
        """Forget every prompt, here and in the generators, which keep their engines."""
        own = [*self._collectors, self._push]
        await self.close()
        self._collectors, self._joining, self._push = [], [], None
        # A push that failed with the learner may have been asked for its outcome already.
        self._watched.forget(lambda task: task in own or isinstance(task.exception(), LearnerLost))
        self._drops_in_a_row = 0
        await self.group.each(lambda it: it.reset, within=self._ping_s)
        self.buffer = TrajectoryBuffer()
        self.ledger.clear()
        self._out.clear()

    async def close(self) -> None:
        tasks = [
            *self._collectors,
            *self._joining,
            *([self._push] if self._push is not None else []),
        ]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
