"""Keeps the generators busy and the buffer filled, and watches for those that fail.

    admit (stream -> ledger -> generators)   as many prompts as the staleness bound allows
    collect (generators -> ledger, buffer)   one task a generator, a long poll each
    take (buffer -> the loop)                waits until the ledger says that a step is ready
    push (learner -> generators)             until each has proved the new weights
    scale                                    more generators, or fewer, beside all this

`take` waits for `collect`, is unblocked by it, and fails with it or with a push. A generator that dies,
hangs, breaks or is lost with its machine is replaced (generator_group.py) and its prompts go out again,
to the others at once; where it may not be replaced the wait ends with a RoleFailed that names it. What
passes through here are names, counts and references; trajectories stay on the machine they are on, or
come to this one, until the learner reads them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from typing import Any

from actors.prompts import PromptStream
from actors.rollout_worker import Rollouts
from actors.scored import Dropped
from actors.trajectory import Prompt
from actors.weight_update import WeightUpdate
from cluster.assignments import Assignments
from cluster.generator_group import GeneratorGroup, Lost, Replacement
from cluster.learner_group import LearnerLost
from cluster.ledger import Ledger
from cluster.placement import Host, Member, RoleFailed, ask_beside
from learner.trajectory_buffer import Batch, TrajectoryBuffer

POLL_S = 1.0
PING_TIMEOUT_S = 30.0
# Seconds for which a generator gathers before it answers. An answer costs it milliseconds that its
# engine needs; and the driver takes about a thousand a second, however many generators there are.
LINGER_S = 0.2
LINGER_PER_GENERATOR_S = 1e-3
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
        self._host = host
        self.stream = stream
        self.ledger = ledger
        self.buffer = TrajectoryBuffer()
        self._roster = self.group.roster
        self._ping_s = ping_timeout_s
        self._timeout_s = rollout_timeout_s
        self._on_drop = on_drop
        self._out = Assignments()
        self._changed = asyncio.Event()
        self._collectors: list[asyncio.Task[None]] = []
        self._joining: list[asyncio.Task[None]] = []
        self._push: asyncio.Task[dict[str, float]] | None = None
        self._failed: list[asyncio.Task[Any]] = []  # of those that are watched
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
            self._changed.clear()
            await self._wait(stop)
        self.ledger.consume(keys)
        return self.buffer.take(keys)

    async def settled(self) -> None:
        """Once all that was leased before the proved version is finished: sampled anew after a resume, it
        would come from newer weights. It has been sampled already; what lacks is at most its score."""
        never = asyncio.Event()
        while self.ledger.num_awaited(self.version):
            self._changed.clear()
            await self._wait(never)

    def watch(self, task: asyncio.Task[Any]) -> None:
        """If it fails, `take` fails with it."""
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._failed.append(task)
            self._changed.set()

    async def _wait(self, stop: asyncio.Event) -> None:
        """Until something changed, a collector or a push failed, or a stop is asked for. It is done for
        every answer of every generator, and so looks at none of their tasks."""
        self._collect()
        waits = [asyncio.ensure_future(self._changed.wait()), asyncio.ensure_future(stop.wait())]
        if not self._failed:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        for task in self._failed:
            task.result()  # raises what it failed of

    async def sample(self, prompts: list[Prompt], temperature: float, seed: int) -> list[Any]:
        """GeneratorGroup.sample, which fails with whatever is watched: no generator may ever come back."""
        sampling = asyncio.create_task(self.group.sample(prompts, temperature, seed))
        never = asyncio.Event()
        sampling.add_done_callback(lambda _: self._changed.set())
        try:
            while not sampling.done():
                self._changed.clear()
                await self._wait(never)
            return await sampling
        finally:
            sampling.cancel()

    async def _submit(self, prompts: list[Prompt]) -> None:
        shares = self._out.deal(prompts, self._roster.present())
        await asyncio.gather(*(self._hand_over(*share) for share in shares.items()))

    async def _hand_over(self, place: int, prompts: list[Prompt]) -> None:
        with contextlib.suppress(Lost):  # then its collector takes them back
            await self.group.ask(place, lambda it: it.submit, prompts, within=self._ping_s)

    def _collect(self) -> None:
        if not self._collectors:
            for place in self._roster.places():
                self._collect_at(place)

    def _collect_at(self, place: int) -> None:
        collector = asyncio.create_task(self._collect_from(place))
        self._collectors.append(collector)
        self.watch(collector)

    async def _collect_from(self, place: int) -> None:
        """One place's life: poll whoever is there, and replace it when it is lost."""
        while not self._roster.is_closed(place):
            if self._roster.is_present(place):
                await self._until_lost(place)
            await self._submit(self._take_back(place))
            await self.group.replace(place)
            await self._submit(self._out.homeless())

    async def _until_lost(self, place: int) -> None:
        poll = asyncio.create_task(self._poll(place))
        lost = asyncio.create_task(self._roster.lost(place))
        try:
            await asyncio.wait([poll, lost], return_when=asyncio.FIRST_COMPLETED)
            if poll.done() and not isinstance(poll.exception(), Lost):
                poll.result()  # raises
        except RoleFailed as error:
            raise RoleFailed(
                f"{error} ({self._out_there(place)})", kind=error.kind, cause=error.cause
            ) from error
        finally:
            poll.cancel()
            lost.cancel()

    def _take_back(self, place: int) -> list[Prompt]:
        """The prompts that are out there, in the order of their leases."""
        held = set(self._out.held_by(place))
        prompts = [prompt for prompt in self.ledger.outstanding() if prompt.key in held]
        for prompt in prompts:
            self._out.release(prompt.key)
        return prompts

    async def _poll(self, place: int) -> None:
        member = self._roster.members[place]
        last_heard, tokens = time.monotonic(), 0
        while True:
            rollouts, chunk = await self.group.or_lost(place, member, self._take_from(member))
            if rollouts:
                last_heard = time.monotonic()
                self._receive(rollouts, chunk)
                if rollouts.dropped:  # others take their places, even if this poll is cancelled
                    await asyncio.shield(self.admit())
                continue
            # Its engine's thread, not only its event loop, has to answer. It may have finished completions
            # that are handed over with others, or wait for scores, which have a deadline of their own.
            status = await self.group.ask(place, lambda it: it.status, within=self._timeout_s)
            before, tokens = tokens, status["completion_tokens"]
            if not self._out.load(place) or tokens != before or status["scoring"]:
                last_heard = time.monotonic()
            elif time.monotonic() - last_heard > self._timeout_s:
                raise self.group.silent(place, member)

    async def _take_from(self, member: Member) -> tuple[Rollouts, Any]:
        """What it has finished. Until this returns, nothing counts as finished: what is lost on the way
        is still out there, and goes to another generator like the rest."""
        rollouts, chunk = await ask_beside(
            member, member.handle.take, POLL_S, self._linger_s(), within=POLL_S + self._ping_s
        )
        if rollouts.finished:
            chunk = await self._host.keep(member, chunk, within=self._ping_s)
        return rollouts, chunk

    def _linger_s(self) -> float:
        """In a synchronous run each answers once a step, and the step waits for it."""
        if not self.ledger.max_staleness:
            return 0.0
        return max(LINGER_S, LINGER_PER_GENERATOR_S * len(self._roster.present()))

    def _receive(self, rollouts: Rollouts, chunk: Any) -> None:
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
        self._changed.set()
        if self._drops_in_a_row >= max(LEAST_DROPS, 2 * self.ledger.prompts_per_step):
            raise RoleFailed(
                f"{self._drops_in_a_row} prompts in a row were dropped, the last one because: "
                f"{rollouts.dropped[-1].reason}"
            )

    def _out_there(self, place: int) -> str:
        out = sorted(prompt_id for prompt_id, _ in self._out.held_by(place))
        return f"{len(out)} prompts were out there, {', '.join(out[:5])} among them"

    # ---- how many there are

    @property
    def collecting(self) -> bool:
        """Whether weights have been pushed since the start, or the last reset: generators may come and go."""
        return bool(self._collectors)

    def num_generators(self) -> int:
        """Those that come or are replaced are counted, too."""
        return len(self._roster.places())

    async def scale(self, count: int) -> bool:
        """Become `count` generators; False if a reset came between. New ones are given prompts once they
        have proved the newest weights; the youngest leave at once, and what they had begun goes to the
        others. RoleFailed if a new one does not come up, once the others have."""
        await asyncio.gather(*map(self.group.dismiss, self._roster.places()[count:]))
        missing = count - self.num_generators()
        self._joining = [asyncio.create_task(self._join()) for _ in range(missing)]
        for ended in await asyncio.gather(*self._joining, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended
        return self.num_generators() == count

    async def _join(self) -> None:
        self._collect_at(await self.group.add())
        await self._submit(self._out.homeless())

    # ---- weights and state of the generators

    async def push(self, update: WeightUpdate) -> list[dict[str, float]]:
        """Returns each generator's proof, when all have proved the new version; from then on it
        counts as the version that prompts are leased at."""
        self._collect()  # from now on one that is lost is replaced
        proofs = await self.group.push(update)
        self.version = update.version
        return list(proofs.values())

    def begin(self, push: Coroutine[Any, Any, dict[str, float]]) -> None:
        """Run a push beside everything else; `take` fails with it."""
        assert self._push is None, "two segments take turns: the last push must have ended"
        self._push = asyncio.create_task(push)
        self.watch(self._push)

    async def proved(self) -> dict[str, float]:
        """What the push that was begun last returned, once it has ended; {} if that was told already."""
        push, self._push = self._push, None
        return await push if push is not None else {}

    async def statuses(self) -> dict[str, dict[str, Any]]:
        """Of each generator that is there, by name."""
        return await self.group.each(lambda it: it.status, within=self._ping_s)

    async def reset(self) -> None:
        """Forget every prompt, here and in the generators, which keep their engines."""
        own = [*self._collectors, self._push]
        await self.close()
        self._collectors, self._joining, self._push = [], [], None
        # A push that failed with the learner may have been asked for its outcome already.
        self._failed = [
            task
            for task in self._failed
            if task not in own and not isinstance(task.exception(), LearnerLost)
        ]
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
