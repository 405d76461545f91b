"""The generators as one: how they are asked, and how weights reach them.

Only generators that are present (roster.py) are asked. One that fails while it is asked is lost, and the
others go on. A generator joins and leaves between two pushes, so no push meets one that is half loaded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from actors.generate_request import GeneratorFailed
from actors.trajectory import Prompt
from actors.weight_update import (
    NeedsAll,
    ProbeAnswer,
    WeightLayout,
    WeightsRejected,
    WeightUpdate,
)
from cluster.learner_group import LearnerLost
from cluster.placement import FOREVER_S, START_TIMEOUT_S, Host, Member, RoleFailed, ask
from cluster.roster import Roster

Asked = TypeVar("Asked")
# Raised by a generator that will never sample again.
REPLACEABLE = (GeneratorFailed, WeightsRejected)


@dataclass(frozen=True)
class Replacement:
    """How a new generator is made."""

    # (slot, how many were started before) -> one that is loading
    start: Callable[[int, int], Member]
    # (in the message, not in shared memory?) -> the newest version in full, the learner's answer to its probe
    last_update: Callable[[bool], Awaitable[tuple[WeightUpdate, ProbeAnswer]]]
    max_restarts: int  # of all generators together
    on_event: Callable[..., None]  # (event, **facts)


class Lost(Exception):
    """The generator that was asked is lost, and its slot is marked so."""


class GeneratorGroup:
    def __init__(
        self,
        members: list[Member],
        host: Host,
        *,
        timeout_s: float,
        ping_s: float,
        replacement: Replacement | None = None,
    ) -> None:
        """`timeout_s`: of a call that needs the engine; `ping_s`: of any other. Without a
        `replacement` a generator that fails fails the run."""
        self.roster = Roster(members)
        self._host = host
        self._timeout_s = timeout_s
        self._ping_s = ping_s
        self._replacement = replacement
        self._layout: WeightLayout | None = None
        self._versions: dict[str, int] = {}  # proved, by name
        self.weights = asyncio.Lock()  # held while versions change

    # ---- asking

    async def ask(self, slot: int, method: Callable[[Any], Any], *args: Any, within: float) -> Any:
        """Ask the generator in `slot`. Raises Lost if a new one can replace it, else its RoleFailed."""
        member = self.roster.members[slot]
        return await self.or_lost(
            slot, member, ask(member, method(member.handle), *args, within=within)
        )

    async def or_lost(self, slot: int, member: Member, answer: Awaitable[Any]) -> Any:
        """`answer`, with its RoleFailed turned into Lost if a new generator can replace the member."""
        try:
            return await answer
        except RoleFailed as error:
            failure = self.given_up(slot, member, error)
            if failure is error:
                raise  # and not "from" itself
            raise failure from error

    def given_up(self, slot: int, member: Member, error: RoleFailed) -> Lost | RoleFailed:
        """What to raise for a failure: Lost, with the slot marked so, if a new generator can replace it."""
        if not self.is_replaceable(error):
            return error
        self.roster.mark_lost(slot, member, error)
        return Lost(str(error))

    def silent(self, slot: int, member: Member) -> Lost | RoleFailed:
        """What to raise for a generator that finishes nothing."""
        said = f"{member.name}: no completion for {self._timeout_s:g} s"
        return self.given_up(slot, member, RoleFailed(said, kind="silent"))

    def is_replaceable(self, error: RoleFailed) -> bool:
        # A generator's weights are asked of the learner, whose loss no new generator mends.
        if isinstance(error, LearnerLost):
            return False
        broken = error.kind in ("died", "silent") or isinstance(error.cause, REPLACEABLE)
        return self._replacement is not None and broken

    async def each(self, method: Callable[[Any], Any], *args: Any, within: float) -> dict[str, Any]:
        """The answer of each present generator, by name."""
        slots = self.roster.present()
        names = [self.roster.members[slot].name for slot in slots]
        calls = (self.ask(slot, method, *args, within=within) for slot in slots)
        return _answered(names, await asyncio.gather(*calls, return_exceptions=True))

    async def wait_started(self) -> list[dict[str, Any]]:
        """Wait until all have loaded; their statuses. One that fails here fails the run: it would again."""
        calls = (ask(it, it.handle.status, within=START_TIMEOUT_S) for it in self.roster.members)
        return await asyncio.gather(*calls)

    async def sample(self, prompts: list[Prompt], temperature: float, seed: int) -> list[Any]:
        """One completion a prompt, by all present generators; in the order of the prompts."""
        answers: list[Any] = [None] * len(prompts)
        left = list(range(len(prompts)))
        while left:
            slots = self.roster.present() or [await self.roster.wait_any()]
            shares = {slot: left[i :: len(slots)] for i, slot in enumerate(slots)}
            calls = (
                self._sample(slot, [prompts[i] for i in share], temperature, seed)
                for slot, share in shares.items()
            )
            drawn = _answered(slots, await asyncio.gather(*calls, return_exceptions=True))
            for slot, completions in drawn.items():
                for i, completion in zip(shares[slot], completions, strict=True):
                    answers[i] = completion
            left = [i for i in left if answers[i] is None]
        return answers

    async def _sample(self, slot: int, prompts: list[Prompt], *given: Any) -> Any:
        """Sample on one generator; it fails if it finishes no completion for `timeout_s`."""
        member = self.roster.members[slot]
        asked = ask(member, member.handle.sample, prompts, *given, within=FOREVER_S)
        sampling = asyncio.create_task(self.or_lost(slot, member, asked))
        tokens = -1
        try:
            while not (await asyncio.wait([sampling], timeout=self._timeout_s))[0]:
                status = await self.ask(slot, lambda it: it.status, within=self._timeout_s)
                if status["completion_tokens"] == tokens:
                    raise self.silent(slot, member)
                tokens = status["completion_tokens"]
            return await sampling
        finally:
            sampling.cancel()

    # ---- weights

    async def agree_layout(self, layout: WeightLayout) -> None:
        self._layout = layout
        self._versions.clear()
        agreed = await self.each(lambda it: it.agree_layout, layout, within=self._ping_s)
        assert set(agreed.values()) <= {layout.id}

    async def push(
        self, update: WeightUpdate, answering: asyncio.Future[ProbeAnswer]
    ) -> dict[str, dict[str, float]]:
        """The proof of each present generator, by name, once all have proved the version. `answering`: the
        learner's answer to the probe. RoleFailed if all reject the first one."""
        shared = self._host.share(update) if update.payload else update
        async with self.weights:
            slots = [
                slot
                for slot in self.roster.present()
                if self._versions.get(self.roster.members[slot].name) != update.version
            ]
            names = [self.roster.members[slot].name for slot in slots]
            calls = (self._receive(slot, shared, answering) for slot in slots)
            proofs = _answered(names, await asyncio.gather(*calls, return_exceptions=True))
            self._versions |= dict.fromkeys(proofs, update.version)
        losses = [] if self._versions else [self.roster.failure(slot) for slot in slots]
        if losses and all(isinstance(loss.cause, WeightsRejected) for loss in losses):
            raise losses[0]  # others in their slot would reject the first weights, too
        return proofs

    async def _receive(self, slot: int, *given: Any) -> Any:
        member = self.roster.members[slot]
        return await self.or_lost(slot, member, self._give(member, *given))

    async def _give(
        self, member: Member, update: Any, answering: asyncio.Future[ProbeAnswer]
    ) -> Any:
        """Its proof of the update, sent in full if it cannot use what the others can."""
        try:
            return await self._proof(member, update, answering)
        except RoleFailed as error:
            if not isinstance(error.cause, NeedsAll) or self._replacement is None:
                raise
        full, answer = await self._replacement.last_update(True)
        return await self._proof(member, full, _there(answer))

    async def _proof(
        self, member: Member, update: Any, answering: asyncio.Future[ProbeAnswer]
    ) -> Any:
        async def tell() -> None:
            answer = await asyncio.shield(answering)
            await ask(member, member.handle.receive_answer, answer, within=self._timeout_s)

        receiving = asyncio.create_task(
            ask(member, member.handle.receive_weights, update, within=self._timeout_s)
        )
        telling = asyncio.create_task(tell())
        try:
            return (await asyncio.gather(receiving, telling))[0]
        finally:  # the other, if one failed
            receiving.cancel()
            telling.cancel()

    async def bring_up(self, member: Member) -> None:
        """A new generator: it loads, agrees on the layout, receives and proves the newest version."""
        assert self._replacement is not None
        assert self._layout is not None
        await ask(member, member.handle.status, within=START_TIMEOUT_S)
        await ask(member, member.handle.agree_layout, self._layout, within=self._ping_s)
        async with self.weights:
            update, answer = await self._replacement.last_update(False)
            await self._give(member, update, _there(answer))
            self._versions[member.name] = update.version


def _there(answer: ProbeAnswer) -> asyncio.Future[ProbeAnswer]:
    """As one to wait for."""
    future = asyncio.get_running_loop().create_future()
    future.set_result(answer)
    return future


def _answered(asked: Sequence[Asked], answers: Sequence[Any]) -> dict[Asked, Any]:
    """The answers of all that were not lost meanwhile. Raises the first other error."""
    for answer in answers:
        if isinstance(answer, BaseException) and not isinstance(answer, Lost):
            raise answer
    return {a: b for a, b in zip(asked, answers, strict=True) if not isinstance(b, Lost)}
